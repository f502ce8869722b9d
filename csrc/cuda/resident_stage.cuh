// What a resident task's stage leaves in its tape and tangent: element by element, from the sums of
// the products (resident_products.cuh) or of the loss. `e` is the element, n * row + o.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/resident_layout.h"
#include "math/activation.h"

namespace FM_CUDA {

template <class S>
struct Evaluated {
  S y, slope, curve;
};

template <class F, class S>
FM_DEVICE Evaluated<S> evaluate(S z, S alpha) {
  const S y = F::f(z, alpha);
  return {y, F::df(z, y, alpha), F::d2f(z, y, alpha)};
}

template <class S>
FM_DEVICE Evaluated<S> activate(LayerKind kind, S z, S alpha) {
  switch (kind) {
    case LayerKind::relu:
      return evaluate<math::Relu>(z, alpha);
    case LayerKind::leaky_relu:
      return evaluate<math::LeakyRelu>(z, alpha);
    case LayerKind::tanh:
      return evaluate<math::Tanh>(z, alpha);
    case LayerKind::sigmoid:
      return evaluate<math::Sigmoid>(z, alpha);
    case LayerKind::silu:
      return evaluate<math::Silu>(z, alpha);
    case LayerKind::gelu:
      return evaluate<math::Gelu>(z, alpha);
    case LayerKind::gelu_tanh:
      return evaluate<math::GeluTanh>(z, alpha);
    case LayerKind::elu:
      return evaluate<math::Elu>(z, alpha);
    case LayerKind::softplus:
      return evaluate<math::Softplus>(z, alpha);
    default:
      return {z, S(1), S(0)};
  }
}

template <class S>
FM_DEVICE void put_activation(const ResidentStage<S>& s, S* tape, int e, S z) {
  const Evaluated<S> f = activate(s.activation, z, s.alpha);
  tape[s.a + e] = f.y;
  if (s.slope >= 0) tape[s.slope + e] = f.slope;
  if (s.curve >= 0) tape[s.curve + e] = f.curve;
}

// a = f(z) and what else the tape keeps of it
template <class S>
FM_DEVICE void put_output(const ResidentStage<S>& s, S* tape, int first, int o, int count,
                          const S (&z)[kTileSamples]) {
  const bool known = s.activation == LayerKind::bilinear || s.activation == LayerKind::relu;
  FM_UNROLL
  for (int m = 0; m < kTileSamples; ++m) {
    const int e = (first + m) * s.row + o;
    if (first + m >= count) continue;
    if (s.activation == LayerKind::relu) {
      const Evaluated<S> f = evaluate<math::Relu>(z[m], S(0));
      tape[s.a + e] = f.y;
      tape[s.slope + e] = f.slope;
    } else {
      tape[s.a + e] = z[m];
    }
  }
  if (known) return;
  FM_NO_UNROLL
  for (int n = first; n < min_of(first + kTileSamples, count); ++n) {
    put_activation(s, tape, n * s.row + o, tape[s.a + n * s.row + o]);
  }
}

// d = f'(z) da
template <class S>
FM_DEVICE void put_adjoint(const ResidentStage<S>& s, S* tape, int e, S da) {
  if (s.da >= 0) tape[s.da + e] = da;
  tape[s.d + e] = s.slope >= 0 ? tape[s.slope + e] * da : da;
}

// ta = f'(z) tz
template <class S>
FM_DEVICE void put_tangent(const ResidentStage<S>& s, const S* tape, S* tangent, int e, S tz) {
  if (s.tz != s.ta) tangent[s.tz + e] = tz;
  tangent[s.ta + e] = s.slope >= 0 ? tape[s.slope + e] * tz : tz;
}

// td = f''(z) tz da + f'(z) tda
template <class S>
FM_DEVICE void put_tangent_adjoint(const ResidentStage<S>& s, const S* tape, S* tangent, int e,
                                   S tda) {
  S td = s.slope >= 0 ? tape[s.slope + e] * tda : tda;
  if (s.curve >= 0) td += tape[s.curve + e] * tangent[s.tz + e] * tape[s.da + e];
  tangent[s.td + e] = td;
}

}  // namespace FM_CUDA
