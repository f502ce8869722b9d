// Pooling over windows of an image, channels last. Padding never wins a maximum and counts as zeros
// in an average (PyTorch's count_include_pad).
//
//   max       y = x[winner]          dx[winner] += dy       tangents the same: the winner is kept
//   average   y = sum x / k          dx += dy / k           tangents are the passes themselves
//
// A thread takes a pack of channels of one pixel of the result. Adjoints are gathered, not
// scattered: a pixel of dx adds up the outputs whose windows hold it, in ascending order, so that
// nothing is cleared beforehand and no two threads write the same place.
// saved (max): the winning tap of every output, an integer as wide as the scalar, channels last.
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pack.cuh"

namespace FM_CUDA {
namespace {

template <class S>
struct TapOf;
template <>
struct TapOf<float> {
  using Int = std::int32_t;
};
template <>
struct TapOf<double> {
  using Int = std::int64_t;
};
template <class S>
using Tap = typename TapOf<S>::Int;

template <class S>
struct PoolParams {
  const S* from;    // x or tx; dy or tdy
  S* to;            // y or ty; dx or tdx
  Tap<S>* winners;  // max: as the outputs
  unsigned items;   // packs of the result
  int in[2], out[2], channels;
  int kernel[2], stride[2], padding[2];
};

enum class Pool { winner, gather, average, scatter, spread };

// Where a thread's pack is: offset of its image's first element in `from`, its pixel, its channel.
struct Place {
  index_t image;
  int h, w, c;
};

template <int W, class S>
FM_DEVICE Place place_of(const PoolParams<S>& p, unsigned item, const int (&size)[2],
                         const int (&other)[2]) {
  const unsigned packs = unsigned(p.channels / W), pixels = unsigned(size[0]) * unsigned(size[1]);
  const unsigned pixel = item / packs % pixels;
  return {index_t(item / packs / pixels) * other[0] * other[1] * p.channels,
          int(pixel / unsigned(size[1])), int(pixel % unsigned(size[1])), int(item % packs) * W};
}

// Outputs: tap(i, offset) for the taps of a window inside the image.
template <class S, class Body>
FM_DEVICE void for_taps(const PoolParams<S>& p, const Place& at, Body&& body) {
  if (!p.from) return;  // a null tangent is zero
  for (int i = 0; i < p.kernel[0]; ++i) {
    const int row = at.h * p.stride[0] - p.padding[0] + i;
    if (row < 0 || row >= p.in[0]) continue;
    for (int j = 0; j < p.kernel[1]; ++j) {
      const int column = at.w * p.stride[1] - p.padding[1] + j;
      if (column < 0 || column >= p.in[1]) continue;
      body(i * p.kernel[1] + j, at.image + (index_t(row) * p.in[1] + column) * p.channels + at.c);
    }
  }
}

// Inputs: tap(i, offset) for the outputs whose windows hold a pixel, and the tap it is to them.
template <class S, class Body>
FM_DEVICE void for_windows(const PoolParams<S>& p, const Place& at, Body&& body) {
  const auto first = [&](int place, int axis) {  // output whose window ends at or behind a place
    const int beyond = place + p.padding[axis] - p.kernel[axis] + 1;
    return beyond <= 0 ? 0 : (beyond + p.stride[axis] - 1) / p.stride[axis];
  };
  const auto last = [&](int place, int axis) {
    return min_of(p.out[axis] - 1, (place + p.padding[axis]) / p.stride[axis]);
  };
  for (int h = first(at.h, 0); h <= last(at.h, 0); ++h) {
    for (int w = first(at.w, 1); w <= last(at.w, 1); ++w) {
      const int i = at.h + p.padding[0] - h * p.stride[0];
      const int j = at.w + p.padding[1] - w * p.stride[1];
      body(i * p.kernel[1] + j, at.image + (index_t(h) * p.out[1] + w) * p.channels + at.c);
    }
  }
}

template <class S, int W, Pool Kind>
FM_KERNEL void __launch_bounds__(kThreads, 1) pool_kernel(const PoolParams<S> p) {
  await_previous_kernels();
  constexpr bool kAdjoint = Kind == Pool::scatter || Kind == Pool::spread;
  const unsigned item = blockIdx.x * blockDim.x + threadIdx.x;
  if (item >= p.items) return;
  const Place at = kAdjoint ? place_of<W>(p, item, p.in, p.out) : place_of<W>(p, item, p.out, p.in);
  const index_t own = index_t(item) * W;
  const S weight = S(1) / S(p.kernel[0] * p.kernel[1]);
  Pack<S, W> result{};
  Pack<Tap<S>, W> winner{};
  if constexpr (Kind == Pool::winner) {
    FM_UNROLL
    for (int w = 0; w < W; ++w) result.at[w] = S(-INFINITY);
    for_taps(p, at, [&](int tap, index_t i) {
      const Pack<S, W> x = load<W>(p.from + i);
      FM_UNROLL
      for (int w = 0; w < W; ++w) {
        const S v = x.at[w];
        const bool better = v > result.at[w] || v != v;  // as in PyTorch, NaN wins
        result.at[w] = better ? v : result.at[w];
        winner.at[w] = better ? Tap<S>(tap) : winner.at[w];
      }
    });
    store(p.winners + own, winner);
  } else if constexpr (Kind == Pool::gather) {
    winner = load<W>(p.winners + own);
    for_taps(p, at, [&](int tap, index_t i) {
      const Pack<S, W> x = load<W>(p.from + i);
      FM_UNROLL
      for (int w = 0; w < W; ++w) result.at[w] = winner.at[w] == tap ? x.at[w] : result.at[w];
    });
  } else if constexpr (Kind == Pool::average) {
    for_taps(p, at, [&](int, index_t i) {
      const Pack<S, W> x = load<W>(p.from + i);
      FM_UNROLL
      for (int w = 0; w < W; ++w) result.at[w] += x.at[w];
    });
    FM_UNROLL
    for (int w = 0; w < W; ++w) result.at[w] *= weight;
  } else {
    for_windows(p, at, [&](int tap, index_t i) {
      const Pack<S, W> dy = load<W>(p.from + i);
      if constexpr (Kind == Pool::scatter) winner = load<W>(p.winners + i);
      FM_UNROLL
      for (int w = 0; w < W; ++w) {
        if constexpr (Kind == Pool::spread) {
          result.at[w] += dy.at[w] * weight;
        } else {
          result.at[w] += winner.at[w] == tap ? dy.at[w] : S(0);
        }
      }
    });
  }
  store(p.to + own, result);
}

template <Pool Kind, class S>
void run(const LayerArgs<S>& a, const S* from, S* to, const Exec& exec) {
  constexpr bool kAdjoint = Kind == Pool::scatter || Kind == Pool::spread;
  if (!to) return;
  const LayerDesc& d = *a.desc;
  PoolParams<S> p{from,
                  to,
                  reinterpret_cast<Tap<S>*>(a.saved),
                  0,
                  {int(d.in.height), int(d.in.width)},
                  {int(d.out.height), int(d.out.width)},
                  int(d.in.channels),
                  {int(d.window.kernel[0]), int(d.window.kernel[1])},
                  {int(d.window.stride[0]), int(d.window.stride[1])},
                  {int(d.window.padding[0]), int(d.window.padding[1])}};
  const bool wide = d.in.channels % kPack<S> == 0 && on_packs({from, to, a.saved});
  const index_t size = kAdjoint ? d.in.size() : d.out.size();
  const index_t items = a.tasks * a.samples * size / (wide ? kPack<S> : 1);
  const unsigned blocks = flat_blocks(items, "pooling");
  p.items = unsigned(items);
  if (wide) {
    launch((pool_kernel<S, kPack<S>, Kind>), blocks, kThreads, 0, exec, p);
  } else {
    launch((pool_kernel<S, 1, Kind>), blocks, kThreads, 0, exec, p);
  }
}

}  // namespace

template <class S>
void max_pool_forward(const LayerArgs<S>& a, const Exec& exec) {
  run<Pool::winner>(a, a.x, a.y, exec);
}

template <class S>
void max_pool_backward(const LayerArgs<S>& a, const Exec& exec) {
  run<Pool::scatter>(a, a.dy, a.dx, exec);
}

template <class S>
void max_pool_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  run<Pool::gather>(a, a.tx, a.ty, exec);
}

template <class S>
void max_pool_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  run<Pool::scatter>(a, a.tdy, a.tdx, exec);
}

template <class S>
void average_pool_forward(const LayerArgs<S>& a, const Exec& exec) {
  run<Pool::average>(a, a.x, a.y, exec);
}

template <class S>
void average_pool_backward(const LayerArgs<S>& a, const Exec& exec) {
  run<Pool::spread>(a, a.dy, a.dx, exec);
}

template <class S>
void average_pool_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  run<Pool::average>(a, a.tx, a.ty, exec);
}

template <class S>
void average_pool_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  run<Pool::spread>(a, a.tdy, a.tdx, exec);
}

FM_INSTANTIATE_PASSES(max_pool, float);
FM_INSTANTIATE_PASSES(max_pool, double);
FM_INSTANTIATE_PASSES(average_pool, float);
FM_INSTANTIATE_PASSES(average_pool, double);

}  // namespace FM_CUDA
