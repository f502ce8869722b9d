// The sine of many moderate arguments, in a form that compilers vectorize.
#pragma once

#include "common/macros.h"

namespace fm::math {

// Arguments up to this size are reduced without loss that float32 would show.
constexpr double kSineRange = 1e5;

// sin(x) for |x| <= kSineRange, to 2e-11: far below the rounding of float32. With k the integer
// nearest to x / pi, sin(x) = (-1)^k sin(x - k pi), and there the Taylor series to the 15th power.
FM_INLINE double moderate_sine(double x) {
  // adding and taking away 1.5 * 2^52 rounds to an integer
  constexpr double kRound = 0x1.8p52, kPi = 0x1.921fb54442d18p1;
  const double k = (x * (1 / kPi) + kRound) - kRound;
  const double odd = k - 2 * ((k * 0.5 + kRound) - kRound);  // -1, 0 or 1
  const double r = x - k * kPi, s = r * r;
  double p = -1.0 / 1307674368000;
  p = p * s + 1.0 / 6227020800;
  p = p * s - 1.0 / 39916800;
  p = p * s + 1.0 / 362880;
  p = p * s - 1.0 / 5040;
  p = p * s + 1.0 / 120;
  p = p * s - 1.0 / 6;
  return (1 - 2 * odd * odd) * (r + r * s * p);
}

}  // namespace fm::math
