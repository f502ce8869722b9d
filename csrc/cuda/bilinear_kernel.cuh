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
#include "cuda/bilinear_store.cuh"
#include "cuda/bilinear_tensor.cuh"
#include "cuda/bilinear_tile.cuh"
#include "cuda/sign_bits.cuh"

namespace FM_CUDA {

// What a block works on.
template <class S, Form form>
struct BlockTask {
  int tile_m, tile_n, group, task;
  FM_DEVICE BlockTask(const Product<S>& p, int block) {
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

// Block number `block` of a product.
template <class S, class Loop, Form form>
FM_DEVICE void bilinear_block(const Product<S>& p, int block) {
  using F = Feed<S, Loop, form>;
  using L = typename F::L;
  constexpr int kStages = Loop::kStages, kK = Loop::kTileK;
  const ProductShape& s = p.shape;
  S* shared = shared_memory<S>();
  const BlockTask<S, form> at(p, block);
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

  if constexpr (form == Form::weights) {
    store_weights<L>(p, feed, at.group, at.task, loop, sums_bias, bias, shared);
  } else {
    S* result = p.result + at.task * p.result_stride;
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
FM_KERNEL void __launch_bounds__(kProductThreads, Loop::kMinBlocks)
    bilinear_kernel(const Product<S> p) {
  await_previous_kernels();
  bilinear_block<S, Loop, form>(p, int(blockIdx.x));
}

// Bytes of a block's shared memory.
template <class S, class Loop, Form form>
constexpr std::size_t kProductShared = Loop::kStages * Feed<S, Loop, form>::L::kStage * sizeof(S) +
                                       Feed<S, Loop, form>::kTable * sizeof(PixelRow) +
                                       (form == Form::weights ? 0 : Loop::kTileM * sizeof(int));

// Cuts the result into tiles, and returns the blocks of all tasks.
template <class Loop, class S>
index_t cut_into_tiles(Product<S>& p, index_t tasks) {
  p.tiles_m = int(blocks_for(p.shape.rows, Loop::kTileM));
  p.tiles_n = int(blocks_for(p.shape.columns, Loop::kTileN));
  const index_t blocks = tasks * p.shape.groups * p.tiles_m * p.tiles_n;
  require(blocks < index_t(1) << 30, "bilinear: ", tasks, " tasks of ", p.shape.samples,
          " samples need ", blocks, " blocks, of fewer than 2^30; use fewer tasks at a time");
  return blocks;
}

template <class T>
struct TypeOf {
  using type = T;
};

// use(TypeOf<Loop>()) with the main loop of a choice.
template <Arithmetic arithmetic, class Use>
void with_tensor_loop(TileShape tile, const Use& use) {
  switch (tile) {
    case TileShape::t128x32:
      return use(TypeOf<TensorLoop<128, 32, 32, 32, 3, arithmetic>>());
    case TileShape::t64x64:
      return use(TypeOf<TensorLoop<64, 64, 32, 32, 3, arithmetic>>());
    case TileShape::t32x32:
      return use(TypeOf<TensorLoop<32, 32, 16, 16, 4, arithmetic>>());
    case TileShape::t16x64:
      return use(TypeOf<TensorLoop<16, 64, 16, 16, 4, arithmetic>>());
    default:
      return use(TypeOf<TensorLoop<128, 8, 32, 8, 3, arithmetic>>());
  }
}

template <class S, class Use>
void with_scalar_loop(TileShape tile, const Use& use) {
  switch (tile) {
    case TileShape::t128x32:
      return use(TypeOf<ScalarLoop<S, 128, 32, 8, 4, 3>>());
    case TileShape::t64x64:
      return use(TypeOf<ScalarLoop<S, 64, 64, 8, 4, 3>>());
    case TileShape::t32x32:
      return use(TypeOf<ScalarLoop<S, 32, 32, 2, 4, 4>>());
    case TileShape::t16x64:
      return use(TypeOf<ScalarLoop<S, 16, 64, 2, 4, 4>>());
    default:
      return use(TypeOf<ScalarLoop<S, 128, 8, 8, 1, 3>>());
  }
}

template <class S, class Use>
void with_loop(Choice choice, const Use& use) {
  if constexpr (sizeof(S) == 4) {
    switch (choice.arithmetic) {
      case Arithmetic::split_tf32:
        return with_tensor_loop<Arithmetic::split_tf32>(choice.tile, use);
      case Arithmetic::tf32:
        return with_tensor_loop<Arithmetic::tf32>(choice.tile, use);
      case Arithmetic::bfloat16:
        return with_tensor_loop<Arithmetic::bfloat16>(choice.tile, use);
      default:
        break;
    }
  }
  with_scalar_loop<S>(choice.tile, use);
}

template <Form form, class S>
void launch_form(Product<S>& p, index_t tasks, Choice choice, const Exec& exec) {
  with_loop<S>(choice, [&](auto loop) {
    using Loop = typename decltype(loop)::type;
    const dim3 grid(unsigned(cut_into_tiles<Loop>(p, tasks)));
    launch(bilinear_kernel<S, Loop, form>, grid, kProductThreads, (kProductShared<S, Loop, form>),
           exec, p);
  });
}

}  // namespace FM_CUDA
