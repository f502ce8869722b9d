// Batch norm, ReLU and a max pooling whose windows neither overlap nor reach over the border, in
// one layer: the normalised image is never written.
//
// The normalisation rises or falls with x as its scale is positive or negative, so the winner of a
// window is known before the statistics are: the sweep that sums x also picks it. Images are cut
// into cells, one a window, and where windows leave a border, one a piece of that: those pixels
// count for the statistics and win nothing. Sweeps are over cells or over rows of winners.
//
//   forward            cells: sums of x, winners;                y from the winners
//   backward           sums over the winners;                    cells: dx
//   tangent_forward    cells: sums of tx, the winners' tangents; ty from the winners
//   tangent_backward   sums over the winners;                    cells: tdx
//
// saved: batch norm's [6, C] (see norm.cuh), then of every output the winner's x and tx. The
// winner's place is the first of its window with this x: of equal values the first wins.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/norm_launch.cuh"

namespace FM_CUDA {
namespace {

template <class S>
struct PoolParams : NormParams<S> {
  const S *x, *tx;  // images, [T, N, in]
  S* dx;            // adjoint of x or its tangent
  S *winners, *twinners;
  int height, width, kernel[2], cells[2], windows[2];  // of an image; cells, windows: along axes
};

// Sweeps over cells. The kernel is K x K if K > 0.
template <class S, int W, NormPass P, int K>
struct CellSweep {
  static constexpr bool kTangent =
      P == NormPass::tangent_forward || P == NormPass::tangent_backward;
  const PoolParams<S>& p;
  index_t task;
  int c;
  const ChannelTable<S>& table;
  int channel;  // of the table

  FM_DEVICE CellSweep(const PoolParams<S>& params, index_t t, int first, const ChannelTable<S>& of,
                      int i)
      : p(params), task(t), c(first), table(of), channel(i) {}

  struct Cell {
    index_t in;         // offset of the first pixel
    index_t out, kept;  // of a window: of the output and of what is saved
    int height, width;
    bool window;
  };
  FM_DEVICE Cell cell(int item) const {
    const unsigned columns = unsigned(p.cells[1]), each = unsigned(p.cells[0]) * columns;
    const unsigned n = unsigned(item) / each, place = unsigned(item) % each;
    const int h = int(place / columns), w = int(place % columns);
    const int kh = K ? K : p.kernel[0], kw = K ? K : p.kernel[1];
    Cell cell;
    cell.window = h < p.windows[0] && w < p.windows[1];
    cell.height = cell.window ? kh : min_of(kh, p.height - h * kh);
    cell.width = cell.window ? kw : min_of(kw, p.width - w * kw);
    cell.in = ((index_t(n) * p.height + h * kh) * p.width + w * kw) * p.channels +
              task * p.first_stride + c;
    const index_t out = ((index_t(n) * p.windows[0] + h) * p.windows[1] + w) * p.channels + c;
    cell.out = out + task * p.rows.dy_stride;
    cell.kept = out + task * p.saved_stride;
    return cell;
  }

  // pixel(offset) for the pixels of a cell, in rows
  template <class Pixel>
  FM_DEVICE void pixels(const Cell& cell, Pixel&& pixel) const {
    if (K > 0 && cell.window) {
      FM_UNROLL
      for (int i = 0; i < K * K; ++i) {
        pixel(cell.in + index_t(i / max_of(K, 1) * p.width + i % max_of(K, 1)) * p.channels);
      }
      return;
    }
    for (int i = 0; i < cell.height; ++i) {
      for (int j = 0; j < cell.width; ++j) {
        pixel(cell.in + index_t(i * p.width + j) * p.channels);
      }
    }
  }

  FM_DEVICE void sum(int item, S (&sum1)[W], S (&sum2)[W]) const {
    const Cell at = cell(item);
    Pack<S, W> winner{}, carried{};  // carried: the winner's key, or its tangent
    bool found[W] = {};
    if constexpr (P == NormPass::tangent_forward) {
      if (at.window) winner = load<W>(p.winners + at.kept);
    }
    bool begun = false;
    pixels(at, [&](index_t i) {
      const Pack<S, W> x = load<W>(p.x + i);
      Pack<S, W> tx{};
      if constexpr (kTangent) tx = load<W>(p.tx + i);
      table.template for_each<W>(channel, [&](int w, const Channel<S>& k) {
        const S value = x.at[w];
        add_terms<P>(k, value, tx.at[w], S(0), S(0), sum1[w], sum2[w]);
        if constexpr (P == NormPass::forward) {
          const S scale = k.scale;  // the winner has the largest x by the scale's sign
          const S key = (scale > S(0) ? S(1) : scale < S(0) ? S(-1) : S(0)) * value;
          const bool better = !begun || key > carried.at[w];
          carried.at[w] = better ? key : carried.at[w];
          winner.at[w] = better ? value : winner.at[w];
        } else {
          const bool here = !found[w] && value == winner.at[w];
          found[w] |= here;
          carried.at[w] = here ? tx.at[w] : carried.at[w];
        }
      });
      begun = true;
    });
    if (!at.window) return;
    if constexpr (P == NormPass::forward) {
      store(p.winners + at.kept, winner);
    } else {
      store(p.twinners + at.kept, carried);
    }
  }

  FM_DEVICE void map(int item) const {
    const Cell at = cell(item);
    Pack<S, W> winner{};
    S h[W] = {}, th[W] = {};
    bool found[W];
    FM_UNROLL
    for (int w = 0; w < W; ++w) found[w] = !at.window;
    if (at.window) {
      winner = load<W>(p.winners + at.kept);
      const Pack<S, W> dy = load<W>(p.rows.dy + at.out);
      Pack<S, W> tdy{};
      if constexpr (P == NormPass::tangent_backward) tdy = load<W>(p.rows.tdy + at.out);
      table.template for_each<W>(channel, [&](int w, const Channel<S>& k) {
        scaled_adjoint<P>(k, winner.at[w], dy.at[w], tdy.at[w], h[w], th[w]);
      });
    }
    pixels(at, [&](index_t i) {
      const Pack<S, W> x = load<W>(p.x + i);
      Pack<S, W> tx{}, result;
      if constexpr (kTangent) tx = load_or_zero<W>(p.tx, i);
      table.template for_each<W>(channel, [&](int w, const Channel<S>& k) {
        const bool here = !found[w] && x.at[w] == winner.at[w];
        found[w] |= here;
        result.at[w] =
            input_adjoint<P>(k, x.at[w], tx.at[w], here ? h[w] : S(0), here ? th[w] : S(0));
      });
      store(p.dx + i, result);
    });
  }
};

template <class S, int W, NormPass P, int K>
FM_KERNEL void __launch_bounds__(kNormBlock<S, W>, kNormBlocks<S, W, P>)
    batch_norm_pool_kernel(const PoolParams<S> p) {
  await_previous_kernels();
  using Cells = CellSweep<S, W, P, K>;
  using Winners = RowSweep<S, W, P>;
  if constexpr (P == NormPass::forward || P == NormPass::tangent_forward) {
    norm_pass<S, W, P, Cells, Winners>(p);
  } else {
    norm_pass<S, W, P, Winners, Cells>(p);
  }
}

template <NormPass P, class S>
void run(const char* name, const LayerArgs<S>& a, S* out, S* dw, const Exec& exec) {
  constexpr bool kSumsCells = P == NormPass::forward || P == NormPass::tangent_forward;
  const LayerDesc& d = *a.desc;
  PoolParams<S> p{};
  static_cast<NormParams<S>&>(p) = norm_params(a, dw, exec);
  const index_t outputs = a.samples * d.out.size(), saved = saved_count(d, a.samples);
  p.winners = a.saved + align_up(6 * d.in.channels, 16);
  p.twinners = p.winners + outputs;
  p.x = a.x;
  p.tx = a.tx;
  p.dx = out;
  p.height = int(d.in.height);
  p.width = int(d.in.width);
  index_t cells = a.samples;
  for (int axis = 0; axis < 2; ++axis) {
    const index_t size = axis == 0 ? d.in.height : d.in.width;
    p.kernel[axis] = int(d.window.kernel[axis]);
    p.windows[axis] = int(axis == 0 ? d.out.height : d.out.width);
    p.cells[axis] = int(divide_up(size, d.window.kernel[axis]));
    cells *= p.cells[axis];
  }
  p.rows = {p.winners, a.tx ? p.twinners : nullptr, a.dy, a.tdy, out, saved, outputs, outputs};
  const index_t pixels = a.samples * d.in.pixels(), rows = a.samples * d.out.pixels();
  p.sum_items = int(kSumsCells ? cells : rows);
  p.map_items = int(kSumsCells ? rows : cells);
  if (P == NormPass::tangent_forward && !a.tx) p.sum_items = 0;
  const bool packs = on_packs({a.x, a.tx, a.dy, a.tdy, out, p.winners});
  const bool square = p.kernel[0] == 2 && p.kernel[1] == 2;
  const auto go = [&](auto wide, auto narrow) {
    run_norm(name, wide, narrow, p, a.tasks, kSumsCells ? pixels : rows, kSumsCells ? rows : pixels,
             packs, kNormThreads, exec);
  };
  if (square) {
    go(batch_norm_pool_kernel<S, kPack<S>, P, 2>, batch_norm_pool_kernel<S, 1, P, 2>);
  } else {
    go(batch_norm_pool_kernel<S, kPack<S>, P, 0>, batch_norm_pool_kernel<S, 1, P, 0>);
  }
}

}  // namespace

template <class S>
void batch_norm_pool_forward(const LayerArgs<S>& a, const Exec& exec) {
  run<NormPass::forward, S>("batch_norm_pool forward", a, a.y, nullptr, exec);
}

template <class S>
void batch_norm_pool_backward(const LayerArgs<S>& a, const Exec& exec) {
  run<NormPass::backward>("batch_norm_pool backward", a, a.dx, a.dw, exec);
}

template <class S>
void batch_norm_pool_tangent_forward(const LayerArgs<S>& a, const Exec& exec) {
  run<NormPass::tangent_forward, S>("batch_norm_pool tangent_forward", a, a.ty, nullptr, exec);
}

template <class S>
void batch_norm_pool_tangent_backward(const LayerArgs<S>& a, const Exec& exec) {
  run<NormPass::tangent_backward>("batch_norm_pool tangent_backward", a, a.tdx, a.tdw, exec);
}

FM_INSTANTIATE_PASSES(batch_norm_pool, float);
FM_INSTANTIATE_PASSES(batch_norm_pool, double);

}  // namespace FM_CUDA
