// Where a layer stores the adjoints g of a vector of parameters:
//
//   to = base + factor * rate * g        [n] of every task
//
// which is the gradient, or the inner update or a step of the chain that it is needed for (Update
// in meta/network.h). A null base is zero, a null rate one. The base may be `to` itself, so each
// element is read and written by one thread.
#pragma once

#include "cuda/launch.h"
#include "program/layer.h"

namespace FM_CUDA {

template <class S>
struct ParameterUpdate {
  S* to;  // null: nowhere
  const S* base;
  index_t stride, base_stride;  // elements from task to task
  S factor;
  const S* rate;

  FM_DEVICE void store(index_t task, index_t i, S g) const {
    const S from = base ? base[task * base_stride + i] : S(0);
    to[task * stride + i] = from + (rate ? factor * *rate : factor) * g;
  }
};

// That of a layer's weight or scale, and that of its bias or shift, into dw or tdw.
template <class S>
ParameterUpdate<S> weight_update(const LayerArgs<S>& a, S* dw) {
  if (!a.desc->has_weight || !dw) return {};
  return {dw, a.dw_base, a.dw_stride, a.dw_base_stride, a.weight_scale, a.weight_rate};
}
template <class S>
ParameterUpdate<S> bias_update(const LayerArgs<S>& a, S* dw) {
  if (!a.desc->has_bias || !dw) return {};
  const index_t at = a.desc->bias_offset;
  const S* base = a.dw_base ? a.dw_base + at : nullptr;
  return {dw + at, base, a.dw_stride, a.dw_base_stride, a.bias_scale, a.bias_rate};
}

}  // namespace FM_CUDA
