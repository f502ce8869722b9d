// Normalisation of one element, shared by batch norm (statistics over the samples of a channel)
// and layer norm (statistics over the features of a sample). M elements share the statistics.
//
//   xhat = (x - mean) r                         r = 1 / sqrt(var + eps)
//   y    = g xhat + b
//   dx   = r (h - m1 - xhat m2)                 h = g dy, m1 = mean(h), m2 = mean(h xhat)
//   txh  = r (tx - tmean) - xhat q              tmean = mean(tx), q = r mean(xhat tx); tr = -r q
//   ty   = g txh + tg xhat + tb
//   tdx  = -q dx + r (th - mean(th) - txh m2 - xhat tm2)
//                                               th = g tdy + tg dy, tm2 = mean(th xhat + h txh)
//   dg   = sum dy xhat      tdg = sum tdy xhat + dy txh      db = sum dy      tdb = sum tdy
#pragma once

#include "common/macros.h"

namespace fm::math {

template <class S>
FM_INLINE S normalized(S x, S mean, S r) {
  return (x - mean) * r;
}

template <class S>
FM_INLINE S normalize_backward(S h, S xhat, S r, S m1, S m2) {
  return r * (h - m1 - xhat * m2);
}

template <class S>
FM_INLINE S normalize_tangent(S tx, S xhat, S r, S tmean, S q) {
  return r * (tx - tmean) - xhat * q;
}

template <class S>
FM_INLINE S normalize_tangent_backward(S dx, S th, S xhat, S txhat, S r, S q, S m2, S tm1, S tm2) {
  return r * (th - tm1 - txhat * m2 - xhat * tm2) - q * dx;
}

}  // namespace fm::math
