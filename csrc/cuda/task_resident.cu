// Task-resident meta-gradients: a block does a whole task of a small network in shared memory.
//
//   theta_{k+1} = theta_k - a_k (.) g_s(theta_k)                                k = 0 .. K-1
//   lambda_K    = w_K g_q(theta_K)
//   lambda_k    = lambda_{k+1} - H_s(theta_k) [a_k (.) lambda_{k+1}] + w_k g_q(theta_k)
//
// With z = x w + b, a = f(z), d and da the adjoints of z and a, a stage is
//
//   forward   z  = x w + b                       tz = x tw + tb + tx w           tw = a_k lambda
//   backward  d  = f'(z) da     dx = d w^T       td = f''(z) tz da + f'(z) tda   tdx = d tw^T + td
//   w^T
//             dw = x^T d        db = sum d       tdw = x^T td + tx^T d           tdb = sum td
//
// All K + 1 sets of parameters, lambda, the samples and the tapes are in shared memory
// (resident_layout.h); one launch reads tensors of the model and writes lambda_0 of every task, and
// a second, small one means over tasks in ascending order, losses too. So a meta-gradient is two
// launches.
//
// Predicted for an H100, never measured: 1-40-40-1 with 10 samples, one step, 25 tasks. A task has
// 16 barriers (one behind the load, five for each of three passes), 12 products of 16 000
// multiply-adds at 350 to 600 cycles each, and some 10 small phases of 150: 6 000 to 8 500 cycles,
// 3.5 to 5 us at 1.7 GHz, with 1 us to load.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/mean_loss.cuh"
#include "cuda/resident_block.cuh"

namespace FM_CUDA {
namespace {

template <class S, class Loss>
FM_KERNEL void __launch_bounds__(kResidentThreads, 1)
    resident_task_kernel(const ResidentParams<S> p) {
  await_previous_kernels();
  ResidentBlock<S, Loss>(p).run();
}

template <class S>
struct ResidentMeanParams {
  const S* rows;  // [T, row]
  index_t row;
  int tasks;
  int offset[2 * kResidentStages], count[2 * kResidentStages];  // of tensors in a row
  S* out[2 * kResidentStages];
  int tensors;
  MeanLoss<S> loss;  // wanted if there are more rows of blocks than tensors
};

// A thread takes an element of the tensor that blockIdx.y names; behind them, a block the losses.
template <class S>
FM_KERNEL void resident_mean_kernel(const ResidentMeanParams<S> p) {
  await_previous_kernels();
  const int tensor = int(blockIdx.y), e = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (tensor == p.tensors) {
    if (blockIdx.x == 0) p.loss.by_block(shared_memory<double>());
    return;
  }
  if (e >= p.count[tensor]) return;
  const S* value = p.rows + p.offset[tensor] + e;
  double sum = 0;
  FM_UNROLL_BY_EIGHT
  for (int t = 0; t < p.tasks; ++t) sum += double(value[t * p.row]);
  p.out[tensor][e] = S(sum / double(p.tasks));
}

constexpr unsigned kMeanThreads = 128;

template <class S>
void mean(const ResidentLayout<S>& at, const ResidentCall<S>& call, const ResidentBatch<S>& batch,
          const Exec& exec) {
  ResidentMeanParams<S> p{};
  p.rows = call.lambdas;
  p.row = call.program->param_count();
  p.tasks = int(call.tasks);
  unsigned tensors = 0;
  index_t largest = 0;
  const auto add = [&](int offset, int count, S* out) {
    p.offset[tensors] = offset;
    p.count[tensors] = count;
    p.out[tensors++] = out;
    largest = max_of<index_t>(largest, count);
  };
  for (int l = 0; l < at.depth; ++l) {
    const ResidentStage<S>& s = at.stages[l];
    add(s.weight, s.inputs() * s.outputs(), batch.gradients[s.segment]);
    if (s.has_bias()) add(s.bias, s.outputs(), batch.gradients[s.segment + 1]);
  }
  p.tensors = int(tensors);
  if (batch.mean_loss) {
    p.loss = MeanLoss<S>::of(call.tasks, {call.steps + 1, call.loss_weights, batch.loss,
                                          batch.accuracy, batch.mean_loss});
  }
  const dim3 grid(unsigned(divide_up(largest, kMeanThreads)), tensors + (batch.mean_loss ? 1 : 0));
  launch(resident_mean_kernel<S>, grid, kMeanThreads, kWarp * sizeof(double), exec, p);
}

template <class S>
ResidentSizes plan(const ResidentCall<S>& call) {
  ResidentLayout<S> at;
  if (!at.plan(call)) return {};
  return {true, 0, 0, at.tape};
}

template <class S>
void all_tasks(const ResidentCall<S>& call, const ResidentBatch<S>& batch, const Exec& exec) {
  const Program& program = *call.program;
  ResidentParams<S> p{};
  require(p.layout.plan(call), "resident tasks: expected a call that was planned");
  for (int l = 0; l < p.layout.depth; ++l) {
    const ResidentStage<S>& s = p.layout.stages[l];
    p.theta.weight[l] = batch.params[s.segment];
    p.theta.bias[l] = s.has_bias() ? batch.params[s.segment + 1] : nullptr;
  }
  p.rates = batch.rates;
  p.rate_per_tensor = batch.rate_per_tensor;
  p.adapted = batch.adapted;
  p.support_x = batch.support_x;
  p.support_y = batch.support_y;
  p.query_x = batch.query_x;
  p.query_y = batch.query_y;
  p.support_scale = S(program.loss_scale(call.support));
  p.query_scale = S(program.loss_scale(call.query));
  p.loss = batch.loss;
  p.accuracy = batch.accuracy;
  p.rows = call.lambdas;
  p.row = program.param_count();
  const unsigned tasks = unsigned(call.tasks);
  const std::size_t bytes = p.layout.bytes();
  switch (program.loss()) {
    case LossKind::squared_error:
      launch((resident_task_kernel<S, SquaredError>), tasks, kResidentThreads, bytes, exec, p);
      break;
    case LossKind::cross_entropy:
      launch((resident_task_kernel<S, CrossEntropy>), tasks, kResidentThreads, bytes, exec, p);
      break;
    default:
      launch((resident_task_kernel<S, Policy<math::PolicyGradient<math::Gaussian>>>), tasks,
             kResidentThreads, bytes, exec, p);
  }
  mean(p.layout, call, batch, exec);
}

}  // namespace

template <class S>
ResidentOps<S> resident_ops() {
  return {plan<S>, nullptr, nullptr, all_tasks<S>};
}

template ResidentOps<float> resident_ops();
template ResidentOps<double> resident_ops();

}  // namespace FM_CUDA
