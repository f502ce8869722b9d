// What each kernel file provides to the table in backend_cuda.cpp, for float and double.
//
// Launchers are named <layer>_<pass> as on the CPU, have the signature of LayerOps or LossOps, take
// all tasks at once and return when the work is in the stream (`exec.context`). Each .cu defines
// its templates and instantiates them for both scalars at its end.
#pragma once

#include "cuda/launch.h"
#include "program/backend.h"

namespace FM_CUDA {

#define FM_PASSES(layer)                                          \
  template <class S>                                              \
  void layer##_forward(const LayerArgs<S>&, const Exec&);         \
  template <class S>                                              \
  void layer##_backward(const LayerArgs<S>&, const Exec&);        \
  template <class S>                                              \
  void layer##_tangent_forward(const LayerArgs<S>&, const Exec&); \
  template <class S>                                              \
  void layer##_tangent_backward(const LayerArgs<S>&, const Exec&)

FM_PASSES(bilinear);         // bilinear*.cu
FM_PASSES(batch_norm);       // batch_norm.cu
FM_PASSES(batch_norm_pool);  // batch_norm_pool.cu
FM_PASSES(layer_norm);       // layer_norm.cu
FM_PASSES(max_pool);         // pool.cu
FM_PASSES(average_pool);     // pool.cu
FM_PASSES(append);           // append.cu
#undef FM_PASSES

// elementwise.cu: F is one of math/activation.h.
template <class F, class S>
void elementwise_forward(const LayerArgs<S>&, const Exec&);
template <class F, class S>
void elementwise_backward(const LayerArgs<S>&, const Exec&);
template <class F, class S>
void elementwise_tangent_forward(const LayerArgs<S>&, const Exec&);
template <class F, class S>
void elementwise_tangent_backward(const LayerArgs<S>&, const Exec&);

#define FM_LOSS(loss)                                 \
  template <class S>                                  \
  void loss##_value(const LossArgs<S>&, const Exec&); \
  template <class S>                                  \
  void loss##_hessian(const LossArgs<S>&, const Exec&)

FM_LOSS(squared_error);  // loss.cu
FM_LOSS(cross_entropy);
FM_LOSS(gaussian_policy);
FM_LOSS(gaussian_ratio);
FM_LOSS(gaussian_kl);
FM_LOSS(categorical_policy);
FM_LOSS(categorical_ratio);
FM_LOSS(categorical_kl);
#undef FM_LOSS

template <class S>
VectorOps<S> vector_ops();  // vector_ops.cu
template <class S>
OptimizerOps<S> optimizer_ops();  // optimizer.cu
template <class S>
ResidentOps<S> resident_ops();  // task_resident.cu

}  // namespace FM_CUDA
