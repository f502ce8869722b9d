// Branch-free exponentials that a compiler can vectorise.
//
// exp(x) = 2^n (1 + p(r)) with n = round(x / ln 2), r = x - n ln 2 (ln 2 in two parts) and p the
// Taylor polynomial of expm1 on |r| <= ln 2 / 2: degree 7 leaves 5e-9 in float, degree 13 leaves
// 4e-18 in double. expm1 keeps its relative accuracy at 0 because 2^n - 1 is exact.
// Arguments are clamped to the range in which 2^n is a normal number.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace fm::math {

template <class S>
struct Exponent;

template <>
struct Exponent<float> {
  using Int = std::int32_t;
  static constexpr int kBias = 127, kShift = 23, kDegree = 7;
  static constexpr float kMin = -87.0f, kMax = 88.0f;
  static constexpr float kHigh = 0.693359375f, kLow = -2.12194440e-4f;
};

template <>
struct Exponent<double> {
  using Int = std::int64_t;
  static constexpr int kBias = 1023, kShift = 52, kDegree = 13;
  static constexpr double kMin = -708.0, kMax = 709.0;
  static constexpr double kHigh = 6.93147180369123816490e-01, kLow = 1.90821492927058770002e-10;
};

template <class S>
struct Reduced {
  S power;  // 2^n
  S rest;   // expm1(r)
};

template <class S>
FM_INLINE Reduced<S> reduce_exponent(S x) {
  using E = Exponent<S>;
  using Int = typename E::Int;
  // NaN fails both comparisons and passes through.
  x = x < E::kMin ? E::kMin : x;
  x = x > E::kMax ? E::kMax : x;
  const S scaled = x * S(1.4426950408889634074);
  // The select keeps the conversion defined when x is NaN; r then carries the NaN on.
  const S guarded = scaled == scaled ? scaled : S(0);
  const Int n = static_cast<Int>(guarded + (guarded < S(0) ? S(-0.5) : S(0.5)));
  const S k = static_cast<S>(n);
  const S r = (x - k * E::kHigh) - k * E::kLow;
  constexpr S inverse_factorial[] = {S(1),
                                     S(1),
                                     S(1.0 / 2),
                                     S(1.0 / 6),
                                     S(1.0 / 24),
                                     S(1.0 / 120),
                                     S(1.0 / 720),
                                     S(1.0 / 5040),
                                     S(1.0 / 40320),
                                     S(1.0 / 362880),
                                     S(1.0 / 3628800),
                                     S(1.0 / 39916800),
                                     S(1.0 / 479001600),
                                     S(1.0 / 6227020800.0)};
  S p = inverse_factorial[E::kDegree];
  FM_UNROLL
  for (int i = E::kDegree - 1; i >= 1; --i) p = p * r + inverse_factorial[i];
  const Int bits = (n + E::kBias) << E::kShift;
  S power;
  std::memcpy(&power, &bits, sizeof(power));
  return {power, p * r};
}

template <class S>
FM_INLINE S exp(S x) {
  const auto e = reduce_exponent(x);
  return e.power + e.power * e.rest;
}

template <class S>
FM_INLINE S expm1(S x) {
  const auto e = reduce_exponent(x);
  return e.power * e.rest + (e.power - S(1));
}

template <class S>
FM_INLINE S tanh(S x) {
  const S magnitude = x < S(0) ? -x : x;
  const S e = expm1(S(2) * (magnitude > S(20) ? S(20) : magnitude));
  const S y = e / (e + S(2));
  return x < S(0) ? -y : y;
}

template <class S>
FM_INLINE S sigmoid(S x) {
  return S(1) / (S(1) + exp(-x));
}

}  // namespace fm::math
