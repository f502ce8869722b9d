// Layer norm over all F features of a sample. Formulas in math/normalize.h.
//
// A block takes a sample: one or two sums over its features, then the map. Adjoints of scale and
// shift are sums over the samples of a task that need no statistics of the pass itself, so other
// blocks of the same launch take them: kColumns features of a task each, the samples in
// kThreads / kColumns interleaved rows, then a tree. They have a launch of their own where they go
// where the tangent of the scale is, which the samples read. All sums are in double and of fixed
// order.
// saved [6, N] per task: mean, r, m1, m2, tmean, q of every sample.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pack.cuh"
#include "cuda/parameter_update.cuh"
#include "cuda/reduce.cuh"
#include "math/normalize.h"

namespace FM_CUDA {
namespace {

enum class Pass { forward, backward, tangent_forward, tangent_backward };

constexpr int kColumns = 16;

template <class S>
struct LayerNormParams {
  const S *x, *tx, *dy, *tdy;                // [T, N, F]
  S* out;                                    // y, dx, ty or tdx
  const S *scale, *tscale, *shift, *tshift;  // [F], null where absent or not perturbed
  index_t w_stride, tw_stride;
  S* saved;
  int tasks, samples, features;
  double eps;
  ParameterUpdate<S> dscale, dshift;  // parameter adjoints or their tangents
  unsigned sample_blocks;             // of this launch; the others are of parameters
};

// Statistics of a sample, as far as a pass has them.
template <class S>
struct Statistics {
  S mean, r, m1, m2, tmean, q;
};

template <Pass P, class S>
FM_DEVICE Statistics<S> statistics_of(const S* saved, int samples) {
  Statistics<S> s{};
  if (P == Pass::forward) return s;
  s.mean = saved[0];
  s.r = saved[samples];
  if (P == Pass::tangent_backward) {
    s.m1 = saved[2 * samples];
    s.m2 = saved[3 * samples];
    s.tmean = saved[4 * samples];
    s.q = saved[5 * samples];
  }
  return s;
}

// One feature of a sample.
template <class S>
struct Feature {
  S xhat, txhat, scale, h, th;
};

template <Pass P, class S>
FM_DEVICE Feature<S> feature_of(const LayerNormParams<S>& p, const Statistics<S>& s, index_t task,
                                index_t row, int i) {
  const auto of = [=](const S* w, index_t stride, S otherwise) {
    return w ? w[task * stride + i] : otherwise;
  };
  Feature<S> f{};
  f.xhat = math::normalized(p.x[row + i], s.mean, s.r);
  f.scale = of(p.scale, p.w_stride, S(1));
  if constexpr (P == Pass::backward || P == Pass::tangent_backward) f.h = f.scale * p.dy[row + i];
  if constexpr (P == Pass::tangent_forward || P == Pass::tangent_backward) {
    const S tx = p.tx ? p.tx[row + i] : S(0);
    f.txhat = math::normalize_tangent(tx, f.xhat, s.r, s.tmean, s.q);
  }
  if constexpr (P == Pass::tangent_backward) {
    f.th = f.scale * p.tdy[row + i] + of(p.tscale, p.tw_stride, S(0)) * p.dy[row + i];
  }
  return f;
}

// The two sums of a pass over the features of a sample; those of the forward pass come one after
// the other, so that the variance is of centred values.
template <Pass P, class S>
FM_DEVICE void sample_sums(const LayerNormParams<S>& p, const Statistics<S>& s, index_t task,
                           index_t row, double (&sums)[2]) {
  double* partial = shared_memory<double>();
  const int first = int(threadIdx.x), step = int(blockDim.x);
  sums[0] = sums[1] = 0;
  if constexpr (P == Pass::forward) {
    for (int i = first; i < p.features; i += step) sums[0] += double(p.x[row + i]);
    sums[0] = block_sum(sums[0], partial);
    const double mean = sums[0] / double(p.features);
    for (int i = first; i < p.features; i += step) {
      const double v = double(p.x[row + i]) - mean;
      sums[1] += v * v;
    }
    sums[1] = block_sum(sums[1], partial);
  } else {
    for (int i = first; i < p.features; i += step) {
      const Feature<S> f = feature_of<P>(p, s, task, row, i);
      if constexpr (P == Pass::backward) {
        sums[0] += double(f.h);
        sums[1] += double(f.h * f.xhat);
      } else if constexpr (P == Pass::tangent_forward) {
        const S tx = p.tx ? p.tx[row + i] : S(0);
        sums[0] += double(tx);
        sums[1] += double(tx * f.xhat);
      } else {
        sums[0] += double(f.th);
        sums[1] += double(f.th * f.xhat + f.h * f.txhat);
      }
    }
    block_sum(sums, partial);
  }
}

template <Pass P, class S>
FM_DEVICE void sample_block(const LayerNormParams<S>& p, index_t sample) {
  const index_t task = sample / p.samples, row = sample * p.features;
  S* saved = p.saved + task * 6 * p.samples + sample % p.samples;
  Statistics<S> s = statistics_of<P>(saved, p.samples);
  double sums[2];
  sample_sums<P>(p, s, task, row, sums);
  const double each = double(p.features);
  S first = S(sums[0] / each), second = S(sums[1] / each);
  if constexpr (P == Pass::forward) {
    s.mean = first;
    s.r = second = S(1.0 / std::sqrt(sums[1] / each + p.eps));
  } else if constexpr (P == Pass::backward) {
    s.m1 = first;
    s.m2 = second;
  } else if constexpr (P == Pass::tangent_forward) {
    s.tmean = first;
    s.q = second = S(double(s.r) * (sums[1] / each));
  }
  if (P != Pass::tangent_backward && threadIdx.x == 0) {
    saved[2 * int(P) * p.samples] = first;
    saved[(2 * int(P) + 1) * p.samples] = second;
  }
  if (!p.out) return;
  const auto of = [=](const S* w, index_t stride, int i) {
    return w ? w[task * stride + i] : S(0);
  };
  for (int i = int(threadIdx.x); i < p.features; i += int(blockDim.x)) {
    const Feature<S> f = feature_of<P>(p, s, task, row, i);
    S out;
    if constexpr (P == Pass::forward) {
      out = f.scale * f.xhat + of(p.shift, p.w_stride, i);
    } else if constexpr (P == Pass::tangent_forward) {
      out =
          f.scale * f.txhat + of(p.tscale, p.tw_stride, i) * f.xhat + of(p.tshift, p.tw_stride, i);
    } else {
      out = math::normalize_backward(f.h, f.xhat, s.r, s.m1, s.m2);
      if constexpr (P == Pass::tangent_backward) {
        out = math::normalize_tangent_backward(out, f.th, f.xhat, f.txhat, s.r, s.q, s.m2, first,
                                               second);
      }
    }
    p.out[row + i] = out;
  }
}

// Adjoints of kColumns features' parameters: dg = sum dy xhat, tdg = sum tdy xhat + dy txhat.
template <Pass P, class S>
FM_DEVICE void parameter_block(const LayerNormParams<S>& p, int block) {
  const int blocks = (p.features + kColumns - 1) / kColumns, task = block / blocks;
  const int column = int(threadIdx.x) % kColumns, i = block % blocks * kColumns + column;
  const int rows = int(blockDim.x) / kColumns;
  double* sums = shared_memory<double>();  // [rows, 2, kColumns]
  double of_scale = 0, of_shift = 0;
  for (int n = int(threadIdx.x) / kColumns; i < p.features && n < p.samples; n += rows) {
    const index_t row = (index_t(task) * p.samples + n) * p.features;
    const Statistics<S> s =
        statistics_of<P>(p.saved + index_t(task) * 6 * p.samples + n, p.samples);
    const Feature<S> f = feature_of<P>(p, s, task, row, i);
    const S dy = p.dy[row + i];
    if constexpr (P == Pass::backward) {
      of_scale += double(dy * f.xhat);
      of_shift += double(dy);
    } else {
      const S tdy = p.tdy[row + i];
      of_scale += double(tdy * f.xhat + dy * f.txhat);
      of_shift += double(tdy);
    }
  }
  double* own = sums + int(threadIdx.x) / kColumns * 2 * kColumns + column;
  own[0] = of_scale;
  own[kColumns] = of_shift;
  for (int half = rows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half * kColumns) {
      own[0] += own[half * 2 * kColumns];
      own[kColumns] += own[half * 2 * kColumns + kColumns];
    }
  }
  if (int(threadIdx.x) >= kColumns || i >= p.features) return;
  if (p.dscale.to) p.dscale.store(task, i, S(own[0]));
  if (p.dshift.to) p.dshift.store(task, i, S(own[kColumns]));
}

template <class S, Pass P>
FM_KERNEL void __launch_bounds__(kThreads, 1) layer_norm_kernel(const LayerNormParams<S> p) {
  await_previous_kernels();
  if (blockIdx.x < p.sample_blocks) {
    sample_block<P>(p, blockIdx.x);
  } else if constexpr (P == Pass::backward || P == Pass::tangent_backward) {
    parameter_block<P>(p, int(blockIdx.x - p.sample_blocks));
  }
}

template <Pass P, class S>
void run(const LayerArgs<S>& a, S* out, S* dw, const Exec& exec) {
  const LayerDesc& d = *a.desc;
  const auto scale = [&](auto* w) { return d.has_weight && w ? w : nullptr; };
  const auto shift = [&](auto* w) { return d.has_bias && w ? w + d.bias_offset : nullptr; };
  LayerNormParams<S> p{a.x,
                       a.tx,
                       a.dy,
                       a.tdy,
                       out,
                       scale(a.w),
                       scale(a.tw),
                       shift(a.w),
                       shift(a.tw),
                       a.w_stride,
                       a.tw_stride,
                       a.saved,
                       int(a.tasks),
                       int(a.samples),
                       int(d.in.size()),
                       d.eps,
                       weight_update(a, dw),
                       bias_update(a, dw),
                       0};
  const index_t samples = a.tasks * a.samples;
  const bool wanted = p.dscale.to || p.dshift.to;
  const index_t parameters = wanted ? a.tasks * divide_up(d.in.size(), kColumns) : 0;
  require(samples + parameters < (index_t(1) << 31),
          "layer norm: expected fewer than 2^31 samples, got ", samples,
          "; use fewer tasks or samples a call");
  const auto go = [&](index_t of_samples, index_t of_parameters) {
    p.sample_blocks = unsigned(of_samples);
    launch((layer_norm_kernel<S, P>), unsigned(of_samples + of_parameters), kThreads,
           2 * kThreads * sizeof(double), exec, p);
  };
  if (p.tscale && p.tscale == p.dscale.to) {
    go(samples, 0);
    go(0, parameters);
  } else {
    go(samples, parameters);
  }
}

}  // namespace

template <class S>
void layer_norm_forward(const LayerArgs<S>& a, const Exec& exec) {
  run<Pass::forward, S>(a, a.y, nullptr, exec);
}

template <class S>
void layer_norm_backward(const LayerArgs<S>& a, const Exec& exec) {
  run<Pass::backward>(a, a.dx, a.dw, exec);
}

template <class S>
void layer_norm_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  run<Pass::tangent_forward, S>(a, a.ty, nullptr, exec);
}

template <class S>
void layer_norm_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  run<Pass::tangent_backward>(a, a.tdx, a.tdw, exec);
}

FM_INSTANTIATE_PASSES(layer_norm, float);
FM_INSTANTIATE_PASSES(layer_norm, double);

}  // namespace FM_CUDA
