// The kernel of bilinear products: a block computes one tile of one task's result.
//
//   tables     where the tile's pixels lie (PixelRow), and where their results go
//   pipeline   kStages tiles of both operands in flight by asynchronous copies, one barrier a tile
//   epilogue   bias, ReLU and its signs, mask, or base + scale * sum, from registers
//
// Operand pairs follow each other in the sum, so that a tangent product is one pass with twice the
// depth. The blocks of `weights` with the first rows also add up the columns of b: the adjoint of
// the bias. Memory, 32-bit scalars: 64 x 64 and three stages are 55 KiB, so that four blocks of 128
// threads fit an H100's multiprocessor at up to 128 registers, three at up to 168.
#pragma once

#include "cuda/bilinear_gather.cuh"
#include "cuda/bilinear_tensor.cuh"
#include "cuda/bilinear_tile.cuh"
#include "cuda/sign_bits.cuh"

namespace FM_CUDA {

// What a block works on.
template <class S, Form form>
struct BlockTask {
  int tile_m, tile_n, group, task;
  FM_DEVICE explicit BlockTask(const Product<S>& p) {
    int block = int(blockIdx.x);
    tile_n = block % p.tiles_n;
    block /= p.tiles_n;
    tile_m = block % p.tiles_m;
    block /= p.tiles_m;
    group = block % p.shape.groups;
    task = block / p.shape.groups;
  }
};

// Copies tiles of the operands to shared memory.
template <class S, class Loop, Form form>
struct Feed {
  using L = TileLayout<S, form, Loop::kTileM, Loop::kTileN, Loop::kTileK>;
  static constexpr int kM = Loop::kTileM, kN = Loop::kTileN, kK = Loop::kTileK;
  static constexpr int kUnit = 16 / int(sizeof(S));
  static constexpr int kTable = form == Form::weights ? 2 * kK : kM;

  const Product<S>& p;
  const PixelClass<form>& pixels;
  S* stages;
  PixelRow* table;
  const S *a0, *a1, *b0, *b1;
  int m0, n0, begin, depth, per_pair;  // steps [begin, begin + depth) of the sum
  TapColumn fixed;                     // `weights`: the thread's column of a

  FM_DEVICE Feed(const Product<S>& product, const PixelClass<form>& c, const BlockTask<S, form>& at,
                 S* shared)
      : p(product), pixels(c), stages(shared) {
    const ProductShape& s = p.shape;
    table = reinterpret_cast<PixelRow*>(stages + Loop::kStages * L::kStage);
    a0 = p.pair[0].a + at.task * p.pair[0].a_stride;
    a1 = p.pair[1].a + at.task * p.pair[1].a_stride;
    b0 = p.pair[0].b + at.task * p.pair[0].b_stride;
    b1 = p.pair[1].b + at.task * p.pair[1].b_stride;
    m0 = at.tile_m * kM;
    n0 = at.tile_n * kN;
    begin = form == Form::weights ? at.group * s.part : 0;
    depth = form == Form::weights  ? min_of(s.part, s.depth - begin)
            : form == Form::inputs ? c.taps() * s.channels
                                   : s.depth;
    per_pair = (depth + kK - 1) / kK;
    if (form == Form::weights) {
      fixed = tap_column(s, c, m0 + (p.wide_a ? ShareA<kUnit>::column() : ShareA<1>::column()));
    }
  }

  FM_DEVICE int tiles() const { return p.pairs * per_pair; }
  FM_DEVICE bool second(int tile) const { return tile >= per_pair; }
  FM_DEVICE int first_step(int tile) const { return (second(tile) ? tile - per_pair : tile) * kK; }

  static constexpr int kColumnsA = L::kDepthInnerA ? kK : kM;
  static constexpr int kColumnsB = L::kDepthInnerB ? kK : kN;
  template <int Unit>
  using ShareA = CopyShare<kColumnsA, Unit>;
  template <int Unit>
  using ShareB = CopyShare<kColumnsB, Unit>;

  // `outputs` and `inputs`: the tile's pixels, and which pixels of the result they are, or -1.
  FM_DEVICE void look_up_rows(int* targets) {
    const ProductShape& s = p.shape;
    const int m = int(threadIdx.x);
    if (m >= kM) return;
    PixelRow row{0, kNowhere, kNowhere};
    int target = -1;
    if (m0 + m < s.samples * pixels.pixels()) {
      const int line = (m0 + m) / pixels.x.count, px = m0 + m - line * pixels.x.count;
      const int sample = line / pixels.y.count, py = line - sample * pixels.y.count;
      row = pixel_row(s, pixels, sample, py, px);
      target = (sample * s.pixel_height + pixels.y.first + pixels.y.step * py) * s.pixel_width +
               pixels.x.first + pixels.x.step * px;
    }
    table[m] = row;
    targets[m] = target;
  }

  // `weights`: the pixels of a tile's steps, beside those of the tile before.
  FM_DEVICE void look_up_steps(int tile) {
    const ProductShape& s = p.shape;
    const int k = int(threadIdx.x);
    if (form != Form::weights || k >= kK) return;
    const int step = first_step(tile) + k;
    PixelRow row{0, kNowhere, kNowhere};
    if (step < depth) {
      const int sample = s.by_pixels.quotient(begin + step);
      const int pixel = begin + step - sample * int(s.by_pixels.value);
      const int py = s.by_pixel_width.quotient(pixel);
      row = pixel_row(s, pixels, sample, py, pixel - py * s.pixel_width);
    }
    table[tile % 2 * kK + k] = row;
  }

  template <int Unit>
  FM_DEVICE void copy_a(S* to, const S* a, int tile, int k0) const {
    const ProductShape& s = p.shape;
    const int column = ShareA<Unit>::column();
    if (form == Form::weights) {
      copy_pixels<kK, kM, L::kStrideA, Unit>(to, a, table + tile % 2 * kK, fixed,
                                             m0 + column < s.rows, s);
    } else {
      const TapColumn tap = tap_column(s, pixels, k0 + column);
      copy_pixels<kM, kK, L::kStrideA, Unit>(to, a, table, tap, k0 + column < depth, s);
    }
  }

  template <int Unit>
  FM_DEVICE void copy_b(S* to, const S* b, int k0) const {
    const ProductShape& s = p.shape;
    const int column = ShareB<Unit>::column();
    if (form == Form::inputs) {
      const TapColumn tap = tap_column(s, pixels, k0 + column);
      copy_matrix<kN, kK, L::kStrideB, Unit>(to, b + n0 * s.out + tap.kernel_offset, s.out,
                                             s.columns - n0, k0 + column < depth);
    } else {
      copy_matrix<kK, kN, L::kStrideB, Unit>(to, b + index_t(begin + k0) * s.columns + n0 + column,
                                             s.columns, depth - k0, n0 + column < s.columns);
    }
  }

  FM_DEVICE void copy(int tile) const {
    S* to = stages + tile % Loop::kStages * L::kStage;
    const int k0 = first_step(tile);
    const S *a = second(tile) ? a1 : a0, *b = second(tile) ? b1 : b0;
    if (p.wide_a) {
      copy_a<kUnit>(to, a, tile, k0);
    } else {
      copy_a<1>(to, a, tile, k0);
    }
    if (p.wide_b) {
      copy_b<kUnit>(to + L::kSizeA, b, k0);
    } else {
      copy_b<1>(to + L::kSizeA, b, k0);
    }
  }
};

template <class S>
FM_DEVICE S scaled(S scale, const S* rate) {
  return rate ? scale * *rate : scale;
}

// Stores a run of finished sums at `index` of the result; `width` of them exist.
template <int N, class S, class Finish>
FM_DEVICE void store_run(S* result, index_t index, const Run<N, S>& run, int width, bool wide,
                         const Finish& finish) {
  if (wide) {
    if (width > 0) *reinterpret_cast<Run<N, S>*>(result + index) = finish(run, index, N);
  } else {
    const Run<N, S> done = finish(run, index, width);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < width) result[index + i] = done.v[i];
    }
  }
}

// The adjoint of the bias: columns of b, summed by two threads each, whatever the tile.
template <class S, int Columns>
struct ColumnSum {
  static constexpr int kParts = 2;
  S total = 0;

  template <int Depth, int Stride>
  FM_DEVICE void add(const S* b) {
    if (int(threadIdx.x) >= kParts * Columns) return;
    S sum = 0;
#pragma unroll
    for (int k = 0; k < Depth; k += kParts) {
      sum += b[(k + int(threadIdx.x) / Columns) * Stride + int(threadIdx.x) % Columns];
    }
    total += sum;
  }
  // For threads below Columns, which call it with all others of the block.
  FM_DEVICE S finish(S* shared) const {
    __syncthreads();
    if (int(threadIdx.x) < kParts * Columns) shared[threadIdx.x] = total;
    __syncthreads();
    if (int(threadIdx.x) >= Columns) return 0;
    return shared[threadIdx.x] + shared[threadIdx.x + Columns];
  }
};

template <class S, class Loop, Form form>
FM_KERNEL void __launch_bounds__(kThreads, Loop::kMinBlocks) bilinear_kernel(const Product<S> p) {
  using F = Feed<S, Loop, form>;
  using L = typename F::L;
  constexpr int kStages = Loop::kStages, kK = Loop::kTileK;
  const ProductShape& s = p.shape;
  S* shared = shared_memory<S>();
  const BlockTask<S, form> at(p);
  const PixelClass<form> pixels(s, form == Form::inputs ? at.group : 0);
  F feed(p, pixels, at, shared);
  if (form == Form::inputs && feed.m0 >= s.samples * pixels.pixels()) return;
  int* targets = reinterpret_cast<int*>(feed.table + F::kTable);

  if (form == Form::weights) {
    feed.look_up_steps(0);
  } else {
    feed.look_up_rows(targets);
  }
  __syncthreads();
  const int tiles = feed.tiles();
#pragma unroll
  for (int t = 0; t < kStages - 1; ++t) {
    if (t < tiles) feed.copy(t);
    copy_async_commit();
    if (form == Form::weights) {
      feed.look_up_steps(t + 1);
      __syncthreads();
    }
  }
  const bool sums_bias = form == Form::weights && p.bias_offset > 0 && at.tile_m == 0;
  ColumnSum<S, Loop::kTileN> bias;
  Loop loop;
  for (int t = 0; t < tiles; ++t) {
    // tile t has landed, and nobody reads the stage of tile t - 1 any more
    copy_async_wait<kStages - 2>();
    __syncthreads();
    const int next = t + kStages - 1;
    if (next < tiles) feed.copy(next);
    copy_async_commit();
    feed.look_up_steps(next + 1);
    const S* stage = shared + t % kStages * L::kStage;
    loop.template multiply<L>(stage, stage + L::kSizeA, feed.depth - feed.first_step(t));
    if (sums_bias && !feed.second(t)) {
      bias.template add<kK, L::kStrideB>(stage + L::kSizeA);
    }
  }

  S* result = p.result + at.task * p.result_stride;
  if constexpr (form == Form::weights) {
    result += at.group * p.part_stride;
    const S* base = p.base ? p.base + at.task * p.base_stride : nullptr;
    const S scale = scaled(p.weight_scale, p.weight_rate);
    loop.template for_each<L>([&](int row, int column, const auto& run) {
      if (feed.m0 + row >= s.rows) return;
      store_run(result, index_t(feed.m0 + row) * s.columns + feed.n0 + column, run,
                s.columns - feed.n0 - column, p.wide_out, [&](auto v, index_t index, int width) {
                  using R = decltype(v);
                  constexpr int N = int(sizeof(v.v) / sizeof(S));
                  R from{};
                  if (base && p.wide_out) {
                    from = *reinterpret_cast<const R*>(base + index);
                  } else if (base) {
#pragma unroll
                    for (int i = 0; i < N; ++i) {
                      if (i < width) from.v[i] = base[index + i];
                    }
                  }
#pragma unroll
                  for (int i = 0; i < N; ++i) v.v[i] = from.v[i] + scale * v.v[i];
                  return v;
                });
    });
    if (sums_bias) {
      const S total = bias.finish(shared);
      const int column = feed.n0 + int(threadIdx.x);
      if (int(threadIdx.x) < Loop::kTileN && column < s.columns) {
        const index_t index = p.bias_offset + column;
        result[index] = (base ? base[index] : S(0)) + scaled(p.bias_scale, p.bias_rate) * total;
      }
    }
  } else {
    const S* add = p.bias ? p.bias + at.task * p.bias_stride : nullptr;
    const unsigned* mask = p.mask ? p.mask + at.task * p.sign_stride : nullptr;
    unsigned* signs = p.signs ? p.signs + at.task * p.sign_stride : nullptr;
    const SignTile<Loop::kTileM, Loop::kTileN> of_tile{reinterpret_cast<unsigned char*>(shared)};
    if (form == Form::outputs && signs) __syncthreads();  // nobody reads the stages any more
    loop.template for_each<L>([&](int row, int column, auto run) {
      constexpr int N = int(sizeof(run.v) / sizeof(S));
      const int target = targets[row], first = feed.n0 + column, width = s.columns - first;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (add && i < width) run.v[i] += add[first + i];
        if (p.relu && run.v[i] < S(0)) run.v[i] = 0;
      }
      if constexpr (form == Form::outputs) {
        if (signs) of_tile.put(row, column, run, width);
      }
      if (target < 0 || width <= 0) return;
      if (mask) mask_by_signs(run, mask + target * p.sign_words, first);
      store_run(result, index_t(target) * s.columns + first, run, width, p.wide_out,
                [](auto v, index_t, int) { return v; });
    });
    if (form == Form::outputs && signs) {
      __syncthreads();
      of_tile.store(signs, targets, p.sign_words, feed.n0);
    }
  }
}

template <class S, class Loop, Form form>
void launch_product(Product<S>& p, index_t tasks, const Exec& exec) {
  using F = Feed<S, Loop, form>;
  p.tiles_m = int(blocks_for(p.shape.rows, Loop::kTileM));
  p.tiles_n = int(blocks_for(p.shape.columns, Loop::kTileN));
  const index_t blocks = tasks * p.shape.groups * p.tiles_m * p.tiles_n;
  require(blocks < index_t(1) << 31, "bilinear: ", tasks, " tasks of ", p.shape.samples,
          " samples need ", blocks, " blocks, of at most 2^31 - 1; use fewer tasks at a time");
  constexpr std::size_t kShared = Loop::kStages * F::L::kStage * sizeof(S) +
                                  F::kTable * sizeof(PixelRow) +
                                  (form == Form::weights ? 0 : F::kM * sizeof(int));
  launch(bilinear_kernel<S, Loop, form>, dim3(unsigned(blocks)), kThreads, kShared, exec, p);
}

template <Form form, Arithmetic arithmetic>
void launch_tensor(Product<float>& p, index_t tasks, TileShape tile, const Exec& exec) {
  switch (tile) {
    case TileShape::t128x32:
      return launch_product<float, TensorLoop<128, 32, 32, 32, 3, arithmetic>, form>(p, tasks,
                                                                                     exec);
    case TileShape::t64x64:
      return launch_product<float, TensorLoop<64, 64, 32, 32, 3, arithmetic>, form>(p, tasks, exec);
    case TileShape::t32x32:
      return launch_product<float, TensorLoop<32, 32, 16, 16, 4, arithmetic>, form>(p, tasks, exec);
    case TileShape::t16x64:
      return launch_product<float, TensorLoop<16, 64, 16, 16, 4, arithmetic>, form>(p, tasks, exec);
    default:
      return launch_product<float, TensorLoop<128, 8, 32, 8, 3, arithmetic>, form>(p, tasks, exec);
  }
}

template <Form form, class S>
void launch_scalar(Product<S>& p, index_t tasks, TileShape tile, const Exec& exec) {
  switch (tile) {
    case TileShape::t128x32:
      return launch_product<S, ScalarLoop<S, 128, 32, 8, 4, 3>, form>(p, tasks, exec);
    case TileShape::t64x64:
      return launch_product<S, ScalarLoop<S, 64, 64, 8, 4, 3>, form>(p, tasks, exec);
    case TileShape::t32x32:
      return launch_product<S, ScalarLoop<S, 32, 32, 2, 4, 4>, form>(p, tasks, exec);
    case TileShape::t16x64:
      return launch_product<S, ScalarLoop<S, 16, 64, 2, 4, 4>, form>(p, tasks, exec);
    default:
      return launch_product<S, ScalarLoop<S, 128, 8, 8, 1, 3>, form>(p, tasks, exec);
  }
}

template <Form form, class S>
void launch_form(Product<S>& p, index_t tasks, Choice choice, const Exec& exec) {
  if constexpr (sizeof(S) == 4) {
    switch (choice.arithmetic) {
      case Arithmetic::split_tf32:
        return launch_tensor<form, Arithmetic::split_tf32>(p, tasks, choice.tile, exec);
      case Arithmetic::tf32:
        return launch_tensor<form, Arithmetic::tf32>(p, tasks, choice.tile, exec);
      case Arithmetic::bfloat16:
        return launch_tensor<form, Arithmetic::bfloat16>(p, tasks, choice.tile, exec);
      default:
        break;
    }
  }
  launch_scalar<form>(p, tasks, choice.tile, exec);
}

}  // namespace FM_CUDA
