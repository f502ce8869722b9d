// Task-resident meta-gradients of the emulated CUDA backend, a call of `ResidentOps` each, for
// tests/test_cuda_resident.py. Integers are 64 bits wide; functions return 0, or 1 and leave the
// reason in `last_error`.
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "guarded.h"
#include "program/program.h"

using namespace fm;
namespace emulated = fm::cuda_emulated;

extern "C" {

struct Call {
  index_t double_precision, layers, features, tasks, steps, support, query, first_order, rate_rows,
      rate_per_tensor, seed;
  const char* const* kinds;  // [layers], and of linear layers
  const index_t *in, *out, *bias;
  const double* alpha;
  const char *loss, *reduction;
  const double* loss_weights;  // [K + 1]
  const void* const* params;   // [tensors]
  void* const* gradients;
  const void* rates;
  const std::uint8_t* adapted;
  const void *support_x, *support_y, *query_x, *query_y;
  double *query_loss, *query_accuracy;
  void* rows;  // [T, P]
};

}  // extern "C"

namespace {

Program program_of(const Call& c) {
  std::vector<LayerSpec> layers;
  for (index_t l = 0; l < c.layers; ++l) {
    LayerSpec s;
    s.kind = c.kinds[l];
    s.name = std::to_string(l);
    s.in = c.in[l];
    s.out = c.out[l];
    s.has_bias = c.bias[l] != 0;
    s.alpha = c.alpha[l];
    layers.push_back(s);
  }
  return Program({c.features}, layers, {c.loss, c.reduction});
}

template <class S>
ResidentCall<S> call_of(const Call& c, const Program& program) {
  ResidentCall<S> r;
  r.program = &program;
  r.tasks = c.tasks;
  r.steps = c.steps;
  r.support = c.support;
  r.query = c.query;
  r.first_order = c.first_order != 0;
  r.loss_weights = c.loss_weights;
  r.rate_rows = c.rate_rows;
  r.adapted = c.adapted;
  r.lambdas = static_cast<S*>(c.rows);
  return r;
}

template <class S>
void run(const Call& c) {
  const Program program = program_of(c);
  const ResidentBatch<S> batch{reinterpret_cast<const S* const*>(c.params),
                               reinterpret_cast<S* const*>(c.gradients),
                               static_cast<const S*>(c.rates),
                               c.rate_per_tensor != 0,
                               c.adapted,
                               static_cast<const S*>(c.support_x),
                               static_cast<const S*>(c.query_x),
                               c.support_y,
                               c.query_y,
                               c.query_loss,
                               c.query_accuracy,
                               nullptr};
  emulated::shuffle_threads(std::uint64_t(c.seed));
  emulated::resident_ops<S>().all(call_of<S>(c, program), batch, {});
}

template <class S>
bool planned(const Call& c) {
  const Program program = program_of(c);
  return emulated::resident_ops<S>().plan(call_of<S>(c, program)).taken;
}

}  // namespace

extern "C" {

// Whether the backend takes the call, and elements of a row of `rows`.
int plan(const Call* c, index_t* taken, index_t* row) {
  return guarded([&] {
    *row = program_of(*c).param_count();
    *taken = c->double_precision ? planned<double>(*c) : planned<float>(*c);
  });
}

int meta_gradient(const Call* c) {
  return guarded([&] { c->double_precision ? run<double>(*c) : run<float>(*c); });
}

}  // extern "C"
