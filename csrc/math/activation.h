// Elementwise activations: value, first and second derivative of one scalar.
//
//   forward            y   = f(x)
//   backward           dx  = f'(x) dy
//   tangent_forward    ty  = f'(x) tx
//   tangent_backward   tdx = f''(x) tx dy + f'(x) tdy
//
// df and d2f get x and the saved y = f(x), whichever is cheaper. `kCurved` is false where f'' is
// zero almost everywhere, and the term vanishes at compile time. `a` is the one parameter of the
// leaky and exponential units. Kinks take the derivative PyTorch takes at them.
#pragma once

#include <cmath>

#include "math/elementary.h"

namespace fm::math {

struct Relu {
  static constexpr bool kCurved = false;
  template <class S>
  FM_INLINE static S f(S x, S) {
    return x < S(0) ? S(0) : x;  // written so that NaN passes through
  }
  template <class S>
  FM_INLINE static S df(S x, S, S) {
    return x > S(0) ? S(1) : S(0);
  }
  template <class S>
  FM_INLINE static S d2f(S, S, S) {
    return S(0);
  }
};

struct LeakyRelu {
  static constexpr bool kCurved = false;
  template <class S>
  FM_INLINE static S f(S x, S a) {
    return x > S(0) ? x : a * x;
  }
  template <class S>
  FM_INLINE static S df(S x, S, S a) {
    return x > S(0) ? S(1) : a;
  }
  template <class S>
  FM_INLINE static S d2f(S, S, S) {
    return S(0);
  }
};

struct Tanh {
  static constexpr bool kCurved = true;
  template <class S>
  FM_INLINE static S f(S x, S) {
    return tanh(x);
  }
  template <class S>
  FM_INLINE static S df(S, S y, S) {
    return S(1) - y * y;
  }
  template <class S>
  FM_INLINE static S d2f(S, S y, S) {
    return S(-2) * y * (S(1) - y * y);
  }
};

struct Sigmoid {
  static constexpr bool kCurved = true;
  template <class S>
  FM_INLINE static S f(S x, S) {
    return sigmoid(x);
  }
  template <class S>
  FM_INLINE static S df(S, S y, S) {
    return y * (S(1) - y);
  }
  template <class S>
  FM_INLINE static S d2f(S, S y, S) {
    return y * (S(1) - y) * (S(1) - S(2) * y);
  }
};

struct Silu {
  static constexpr bool kCurved = true;
  template <class S>
  FM_INLINE static S f(S x, S) {
    return x * sigmoid(x);
  }
  template <class S>
  FM_INLINE static S df(S x, S y, S) {
    const S s = sigmoid(x);
    return s + y * (S(1) - s);
  }
  template <class S>
  FM_INLINE static S d2f(S x, S, S) {
    const S s = sigmoid(x);
    return s * (S(1) - s) * (S(2) + x * (S(1) - S(2) * s));
  }
};

// Exact GELU, x Phi(x). The error function comes from libm, one element at a time.
struct Gelu {
  static constexpr bool kCurved = true;
  template <class S>
  FM_INLINE static S cdf(S x) {
    return S(0.5) * std::erfc(x * S(-0.70710678118654752440));
  }
  template <class S>
  FM_INLINE static S pdf(S x) {
    return S(0.39894228040143267794) * exp(S(-0.5) * x * x);
  }
  template <class S>
  FM_INLINE static S f(S x, S) {
    return x * cdf(x);
  }
  template <class S>
  FM_INLINE static S df(S x, S, S) {
    return cdf(x) + x * pdf(x);
  }
  template <class S>
  FM_INLINE static S d2f(S x, S, S) {
    return pdf(x) * (S(2) - x * x);
  }
};

// GELU's tanh approximation: 0.5 x (1 + tanh u), u = k (x + c x^3).
struct GeluTanh {
  static constexpr bool kCurved = true;
  static constexpr double kK = 0.79788456080286535588, kC = 0.044715;
  template <class S>
  FM_INLINE static S t(S x) {
    return tanh(S(kK) * (x + S(kC) * x * x * x));
  }
  template <class S>
  FM_INLINE static S f(S x, S) {
    return S(0.5) * x * (S(1) + t(x));
  }
  template <class S>
  FM_INLINE static S df(S x, S, S) {
    const S v = t(x), du = S(kK) * (S(1) + S(3 * kC) * x * x);
    return S(0.5) * (S(1) + v) + S(0.5) * x * (S(1) - v * v) * du;
  }
  template <class S>
  FM_INLINE static S d2f(S x, S, S) {
    const S v = t(x), du = S(kK) * (S(1) + S(3 * kC) * x * x), d2u = S(6 * kK * kC) * x;
    const S dv = (S(1) - v * v) * du;
    return dv + S(0.5) * x * ((S(1) - v * v) * d2u - S(2) * v * dv * du);
  }
};

struct Elu {
  static constexpr bool kCurved = true;
  template <class S>
  FM_INLINE static S f(S x, S a) {
    const S negative = a * expm1(x);
    return x > S(0) ? x : negative;
  }
  template <class S>
  FM_INLINE static S df(S x, S y, S a) {
    return x > S(0) ? S(1) : y + a;
  }
  template <class S>
  FM_INLINE static S d2f(S x, S y, S a) {
    return x > S(0) ? S(0) : y + a;
  }
};

// softplus(x) = log(1 + e^x), linear above 20 as in PyTorch.
struct Softplus {
  static constexpr bool kCurved = true;
  template <class S>
  FM_INLINE static S f(S x, S) {
    return x > S(20) ? x : (x > S(0) ? x : S(0)) + std::log1p(exp(x > S(0) ? -x : x));
  }
  template <class S>
  FM_INLINE static S df(S x, S, S) {
    return x > S(20) ? S(1) : sigmoid(x);
  }
  template <class S>
  FM_INLINE static S d2f(S x, S, S) {
    const S s = sigmoid(x);
    return x > S(20) ? S(0) : s * (S(1) - s);
  }
};

}  // namespace fm::math
