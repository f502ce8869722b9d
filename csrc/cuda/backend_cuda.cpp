// The table of the CUDA backend. All tasks are taken at once, in one slot, in one stream.
#include "cuda/backend_cuda.h"

#include "cuda/kernels.h"
#include "math/activation.h"

namespace FM_CUDA {
namespace {

#define FM_OPS(layer) \
  {layer##_forward<S>, layer##_backward<S>, layer##_tangent_forward<S>, layer##_tangent_backward<S>}

template <class F, class S>
constexpr LayerOps<S> activation_ops() {
  return {elementwise_forward<F, S>, elementwise_backward<F, S>, elementwise_tangent_forward<F, S>,
          elementwise_tangent_backward<F, S>};
}

index_t task_slots(index_t) { return 1; }

template <class S>
void for_each_task(index_t tasks, index_t, const Exec& exec, typename Backend<S>::Body body,
                   void* state) {
  body(state, 0, 0, tasks, exec);
}

void for_each_range(index_t n, index_t, void (*body)(void*, index_t, index_t), void* state) {
  if (n > 0) body(state, 0, n);
}

#if defined(__CUDACC__)
constexpr const char* kName = "cuda";
#else
constexpr const char* kName = "cuda_emulated";
#endif

// The driver looks into the emulation's memory no more than into a GPU's.
constexpr bool kHostMemory = false;

// In the order of LayerKind and LossKind.
template <class S>
Backend<S> table() {
  return {
      kName,
      {FM_OPS(bilinear), FM_OPS(batch_norm), FM_OPS(batch_norm_pool), FM_OPS(layer_norm),
       activation_ops<math::Relu, S>(), activation_ops<math::LeakyRelu, S>(),
       activation_ops<math::Tanh, S>(), activation_ops<math::Sigmoid, S>(),
       activation_ops<math::Silu, S>(), activation_ops<math::Gelu, S>(),
       activation_ops<math::GeluTanh, S>(), activation_ops<math::Elu, S>(),
       activation_ops<math::Softplus, S>(), FM_OPS(max_pool), FM_OPS(average_pool), FM_OPS(append)},
      {{squared_error_value<S>, squared_error_hessian<S>},
       {cross_entropy_value<S>, cross_entropy_hessian<S>},
       {gaussian_policy_value<S>, gaussian_policy_hessian<S>},
       {gaussian_ratio_value<S>, gaussian_ratio_hessian<S>},
       {gaussian_kl_value<S>, gaussian_kl_hessian<S>},
       {categorical_policy_value<S>, categorical_policy_hessian<S>},
       {categorical_ratio_value<S>, categorical_ratio_hessian<S>},
       {categorical_kl_value<S>, categorical_kl_hessian<S>}},
      vector_ops<S>(),
      optimizer_ops<S>(),
      resident_ops<S>(),
      {},
      true,
      kHostMemory,
      true,
      true,
      false,
      true,
      true,
      task_slots,
      for_each_task<S>,
      for_each_range};
}

}  // namespace

template <class S>
const Backend<S>& backend() {
  static const Backend<S> all = table<S>();
  return all;
}

template const Backend<float>& backend<float>();
template const Backend<double>& backend<double>();

}  // namespace FM_CUDA
