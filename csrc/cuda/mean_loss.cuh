// The meta-loss from the query losses of all tasks, and NaN for those that nobody asked for: the
// work of one block beside those of another mean over tasks.
#pragma once

#include <cmath>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"

namespace FM_CUDA {

constexpr int kLossWeights = 64;  // that travel with a launch

template <class S>
struct MeanLoss {
  double *loss, *accuracy;  // [T, n]
  S* out;
  int tasks, n, first, count;    // of n columns, those with these weights
  double weights[kLossWeights];  // zero: not asked for

  static MeanLoss of(index_t tasks, const TaskLosses<S>& all, index_t first = 0) {
    MeanLoss p{all.loss, all.accuracy, all.out, int(tasks), int(all.n), int(first), 0, {}};
    p.count = int(min_of<index_t>(all.n - first, kLossWeights));
    for (int k = 0; k < p.count; ++k) p.weights[k] = all.weights[first + k];
    return p;
  }

  // `partial`: shared memory [kWarp]
  FM_DEVICE void by_block(double* partial) const {
    double total = 0;
    for (int k = 0; k < count; ++k) {
      const double weight = weights[k];
      double sum = 0;
      for (int t = int(threadIdx.x); t < tasks; t += int(blockDim.x)) {
        const index_t at = index_t(t) * n + first + k;
        if (weight != 0) {
          sum += loss[at];
        } else {
          loss[at] = accuracy[at] = double(NAN);
        }
      }
      if (weight != 0) total += weight * block_sum(sum, partial);
    }
    if (threadIdx.x == 0) *out = (first > 0 ? *out : S(0)) + S(total / double(tasks));
  }
};

}  // namespace FM_CUDA
