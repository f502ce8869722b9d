// The one source of the CPU kernels, compiled per instruction set and scalar type.
//
// The build defines FM_ISA_NAME (baseline, avx2, avx512), FM_SCALAR and FM_DTYPE_NAME (f32, f64);
// everything below lives in the namespace fm::cpu::<isa>_<dtype>, and the one symbol that leaves
// this file is fm::cpu::<isa>_<dtype>::backend().
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "cpu/parallel.h"
#include "cpu/tasks.h"
#include "math/activation.h"
#include "math/loss.h"
#include "math/normalize.h"
#include "math/optimizer.h"
#include "math/policy.h"
#include "program/backend.h"
#include "program/loss.h"
#include "program/plan.h"
#include "program/winograd.h"

#define FM_JOIN_(isa, dtype) isa##_##dtype
#define FM_JOIN(isa, dtype) FM_JOIN_(isa, dtype)
#define FM_KERNELS fm::cpu::FM_JOIN(FM_ISA_NAME, FM_DTYPE_NAME)

// Order matters: simd first.
// clang-format off
#include "cpu/simd.inl.h"
#include "cpu/product.inl.h"
#include "cpu/transpose.inl.h"
#include "cpu/dense.inl.h"
#include "cpu/dense_tail.inl.h"
#include "cpu/winograd_product.inl.h"
#include "cpu/winograd.inl.h"
#include "cpu/winograd_gradient.inl.h"
#include "cpu/bilinear.inl.h"
#include "cpu/factored.inl.h"
#include "cpu/elementwise.inl.h"
#include "cpu/batch_norm.inl.h"
#include "cpu/batch_norm_pool.inl.h"
#include "cpu/conv_band.inl.h"
#include "cpu/conv_norm_pool.inl.h"
#include "cpu/patch_moments.inl.h"
#include "cpu/winner_products.inl.h"
#include "cpu/conv_winners.inl.h"
#include "cpu/layer_norm.inl.h"
#include "cpu/pool.inl.h"
#include "cpu/loss.inl.h"
#include "cpu/vector_ops.inl.h"
#include "cpu/optimizer.inl.h"
#include "cpu/rows.inl.h"
#include "cpu/resident_low_rank.inl.h"
#include "cpu/row_tree.inl.h"
#include "cpu/resident_plan.inl.h"
#include "cpu/resident_products.inl.h"
#include "cpu/resident.inl.h"
// clang-format on

namespace FM_KERNELS {

// A backend pass takes T tasks; the kernels above take one.
template <void (*Pass)(const LayerArgs<S>&, const Exec&)>
void each_task(const LayerArgs<S>& args, const Exec& exec) {
  for (index_t t = 0; t < args.tasks; ++t) {
    LayerArgs<S> one = task_args(args, t), above;
    Factors<S> w, tw;
    if (one.above) {
      above = task_args(*args.above, t);
      one.above = &above;
    }
    if (one.w_factors) one.w_factors = &(w = task_factors(*args.w_factors, t));
    if (one.tw_factors) one.tw_factors = &(tw = task_factors(*args.tw_factors, t));
    Pass(one, exec);
  }
}

template <LossKind Kind, void (*Pass)(const LossArgs<S>&, const Exec&)>
void each_task(const LossArgs<S>& args, const Exec& exec) {
  const index_t element = Kind == LossKind::cross_entropy ? sizeof(std::int64_t) : sizeof(S);
  const index_t target = loss_target_size(Kind, args.outputs) * element;
  for (index_t t = 0; t < args.tasks; ++t) Pass(task_args(args, t, target), exec);
}

template <LossKind Kind, void (*Value)(const LossArgs<S>&, const Exec&),
          void (*Hessian)(const LossArgs<S>&, const Exec&)>
constexpr LossOps<S> loss_ops() {
  return {each_task<Kind, Value>, each_task<Kind, Hessian>};
}

template <LossKind Kind, class Loss>
constexpr LossOps<S> policy_ops() {
  return loss_ops<Kind, policy_value<Loss>, policy_hessian<Loss>>();
}

template <void (*Forward)(const LayerArgs<S>&, const Exec&),
          void (*Backward)(const LayerArgs<S>&, const Exec&),
          void (*TangentForward)(const LayerArgs<S>&, const Exec&),
          void (*TangentBackward)(const LayerArgs<S>&, const Exec&)>
constexpr LayerOps<S> ops() {
  return {each_task<Forward>, each_task<Backward>, each_task<TangentForward>,
          each_task<TangentBackward>};
}

template <class F>
constexpr LayerOps<S> activation_ops() {
  return ops<elementwise_forward<F>, elementwise_backward<F>, elementwise_tangent_forward<F>,
             elementwise_tangent_backward<F>>();
}

// In the order of LayerKind and LossKind.
constexpr Backend<S> table() {
  return {
      "cpu",
      {ops<conv_forward, conv_backward, conv_tangent_forward, conv_tangent_backward>(),
       ops<batch_norm_forward, batch_norm_backward, batch_norm_tangent_forward,
           batch_norm_tangent_backward>(),
       ops<batch_norm_pool_forward, batch_norm_pool_backward, batch_norm_pool_tangent_forward,
           batch_norm_pool_tangent_backward>(),
       ops<layer_norm_forward, layer_norm_backward, layer_norm_tangent_forward,
           layer_norm_tangent_backward>(),
       activation_ops<math::Relu>(), activation_ops<math::LeakyRelu>(),
       activation_ops<math::Tanh>(), activation_ops<math::Sigmoid>(), activation_ops<math::Silu>(),
       activation_ops<math::Gelu>(), activation_ops<math::GeluTanh>(), activation_ops<math::Elu>(),
       activation_ops<math::Softplus>(),
       ops<max_pool_forward, max_pool_backward, max_pool_tangent_forward,
           max_pool_tangent_backward>(),
       ops<average_pool_forward, average_pool_backward, average_pool_tangent_forward,
           average_pool_tangent_backward>(),
       ops<append_forward, append_backward, append_tangent_forward, append_tangent_backward>()},
      {loss_ops<LossKind::squared_error, squared_error_value, squared_error_hessian>(),
       loss_ops<LossKind::cross_entropy, cross_entropy_value, cross_entropy_hessian>(),
       loss_ops<LossKind::gaussian_policy, gaussian_policy_value, gaussian_policy_hessian>(),
       policy_ops<LossKind::gaussian_ratio, math::LikelihoodRatio<math::Gaussian>>(),
       policy_ops<LossKind::gaussian_kl, math::KlDivergence<math::Gaussian>>(),
       policy_ops<LossKind::categorical_policy, math::PolicyGradient<math::Categorical>>(),
       policy_ops<LossKind::categorical_ratio, math::LikelihoodRatio<math::Categorical>>(),
       policy_ops<LossKind::categorical_kl, math::KlDivergence<math::Categorical>>()},
      {descend, scale_by_rates, segment_dots, negative_product, update, fill, copy, add, mean_rows,
       add_rows, nullptr, gather, scatter, to_channels_last, spread_rates, collect_rates,
       mean_loss},
      {adam, sgd},
      {resident_plan, resident_share, resident_task, nullptr},
      {ops<factored_forward, factored_backward, factored_tangent_forward,
           factored_tangent_backward>(),
       transpose_matrix, add_products},
      false,
      true,
      false,
      false,
      true,
      false,
      false,
      task_slots,
      for_each_task,
      for_each_range};
}

const Backend<S>& backend() {
  static const Backend<S> cpu = table();
  return cpu;
}

// The same kernels, given all tasks at once, as a GPU is, by a driver that doesn't look into their
// memory: for tests of that.
const Backend<S>& lockstep_backend() {
  static const Backend<S> cpu = [] {
    Backend<S> t = table();
    t.name = "cpu_lockstep";
    t.resident = {};
    t.lockstep = true;
    t.host_memory = false;
    t.slots = one_slot;
    t.for_each_task = all_tasks;
    t.for_each_range = whole_range;
    return t;
  }();
  return cpu;
}

}  // namespace FM_KERNELS
