// Vectors of parameters: the inner update, the chain, the mean over tasks, and moves between the
// caller's layout and the engine's. All are bound by memory; each is one launch for all tasks.
//
// Blocks are (part of a vector, segment or tensor, task). Segments, indices and rates are in device
// memory, so the host doesn't know a segment's length: kParts blocks step through it together.
// Sums are in double and of fixed order: of a segment over a block, of rows in ascending order.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/mean_loss.cuh"
#include "cuda/pack.cuh"
#include "cuda/reduce.cuh"

namespace FM_CUDA {
namespace {

constexpr unsigned kParts = 8;
constexpr int kEach = 4;  // elements a thread takes of a plain vector

unsigned task_blocks(index_t tasks) {
  require(tasks < 65536, "vector operation: expected fewer than 65536 tasks, got ", tasks);
  return unsigned(tasks);
}

// -- one vector per task, element by element ------------------------------------------------------

enum class Map { negative_product, update, fill, copy, add };

template <class S>
struct MapParams {
  Rows<const S> a, b;  // a: g, or the base, whose data may be null
  Rows<S> out;
  S value;        // update: alpha; fill
  const S* rate;  // update: null is one
  index_t n;
};

template <class S, Map Kind>
FM_KERNEL void __launch_bounds__(kThreads, 1) map_kernel(const MapParams<S> p) {
  await_previous_kernels();
  const index_t task = blockIdx.y;
  const S* a = p.a.data ? p.a.of(task) : nullptr;
  const S* b = p.b.data ? p.b.of(task) : nullptr;
  S* out = p.out.of(task);
  S scale = p.value;
  if constexpr (Kind == Map::update) {
    if (p.rate) scale *= *p.rate;
  }
  const index_t first = index_t(blockIdx.x) * kThreads * kEach + threadIdx.x;
  FM_UNROLL
  for (int k = 0; k < kEach; ++k) {
    const index_t i = first + k * index_t(kThreads);
    if (i >= p.n) return;
    if constexpr (Kind == Map::negative_product) {
      out[i] = -a[i] * b[i];
    } else if constexpr (Kind == Map::update) {
      out[i] = (a ? a[i] : S(0)) + scale * b[i];
    } else if constexpr (Kind == Map::fill) {
      out[i] = p.value;
    } else if constexpr (Kind == Map::copy) {
      out[i] = b[i];
    } else {
      out[i] = out[i] + b[i];
    }
  }
}

template <Map Kind, class S>
void map(index_t tasks, const MapParams<S>& p, const Exec& exec) {
  if (p.n == 0 || tasks == 0) return;
  const dim3 grid(flat_blocks(divide_up(p.n, kEach), "vector operation"), task_blocks(tasks));
  launch((map_kernel<S, Kind>), grid, kThreads, 0, exec, p);
}

template <class S>
void negative_product(index_t tasks, index_t n, Rows<const S> g, Rows<const S> v, Rows<S> out,
                      const Exec& exec) {
  map<Map::negative_product, S>(tasks, {g, v, out, S(0), nullptr, n}, exec);
}

template <class S>
void update(index_t tasks, index_t n, Rows<const S> base, S alpha, const S* rate, Rows<const S> v,
            Rows<S> out, const Exec& exec) {
  map<Map::update, S>(tasks, {base, v, out, alpha, rate, n}, exec);
}

template <class S>
void fill(index_t tasks, index_t n, S value, Rows<S> out, const Exec& exec) {
  map<Map::fill, S>(tasks, {{}, {}, out, value, nullptr, n}, exec);
}

template <class S>
void copy(index_t tasks, index_t n, Rows<const S> v, Rows<S> out, const Exec& exec) {
  map<Map::copy, S>(tasks, {{}, v, out, S(0), nullptr, n}, exec);
}

template <class S>
void add(index_t tasks, index_t n, Rows<const S> v, Rows<S> out, const Exec& exec) {
  map<Map::add, S>(tasks, {{}, v, out, S(0), nullptr, n}, exec);
}

// -- segments -------------------------------------------------------------------------------------

template <class S>
struct SegmentParams {
  StepRates<S> rates;
  Rows<const S> base, v;  // out = base - a (.) v, or a (.) v without a base
  Rows<S> out;
};

template <class S>
FM_KERNEL void __launch_bounds__(kThreads, 1) rates_kernel(const SegmentParams<S> p) {
  await_previous_kernels();
  const Segment segment = p.rates.segments[blockIdx.y];
  const index_t task = blockIdx.z, end = segment.offset + segment.count;
  const S* base = p.base.data ? p.base.of(task) : nullptr;
  const S* v = p.v.of(task);
  S* out = p.out.of(task);
  const S common = p.rates.per_parameter ? S(0) : p.rates.per_segment[blockIdx.y];
  FM_UNROLL_BY_FOUR
  for (index_t i = segment.offset + blockIdx.x * kThreads + threadIdx.x; i < end;
       i += gridDim.x * kThreads) {
    const S rate = p.rates.per_parameter ? p.rates.per_parameter[i] : common;
    out[i] = base ? base[i] - rate * v[i] : rate * v[i];
  }
}

template <class S>
void apply_rates(const StepRates<S>& rates, index_t tasks, Rows<const S> base, Rows<const S> v,
                 Rows<S> out, const Exec& exec) {
  const dim3 grid(kParts, unsigned(rates.segment_count), task_blocks(tasks));
  launch(rates_kernel<S>, grid, kThreads, 0, exec, SegmentParams<S>{rates, base, v, out});
}

template <class S>
void descend(const StepRates<S>& rates, index_t tasks, Rows<const S> theta, Rows<const S> g,
             Rows<S> out, const Exec& exec) {
  apply_rates(rates, tasks, theta, g, out, exec);
}

template <class S>
void scale_by_rates(const StepRates<S>& rates, index_t tasks, Rows<const S> v, Rows<S> out,
                    const Exec& exec) {
  apply_rates(rates, tasks, {}, v, out, exec);
}

template <class S>
struct DotParams {
  const Segment* segments;
  Rows<const S> g, v;
  Rows<S> out;
};

template <class S>
FM_KERNEL void __launch_bounds__(kThreads, 1) segment_dots_kernel(const DotParams<S> p) {
  await_previous_kernels();
  const Segment segment = p.segments[blockIdx.x];
  const index_t task = blockIdx.y, end = segment.offset + segment.count;
  const S *g = p.g.of(task), *v = p.v.of(task);
  double sum = 0;
  FM_UNROLL_BY_FOUR
  for (index_t i = segment.offset + threadIdx.x; i < end; i += kThreads) {
    sum += double(g[i]) * double(v[i]);
  }
  sum = block_sum(sum, shared_memory<double>());
  if (threadIdx.x == 0) p.out.of(task)[blockIdx.x] = S(-sum);
}

template <class S>
void segment_dots(const StepRates<S>& rates, index_t tasks, Rows<const S> g, Rows<const S> v,
                  Rows<S> out, const Exec& exec) {
  const dim3 grid(unsigned(rates.segment_count), task_blocks(tasks));
  launch(segment_dots_kernel<S>, grid, kThreads, kWarp * sizeof(double), exec,
         DotParams<S>{rates.segments, g, v, out});
}

// -- means and rates ------------------------------------------------------------------------------

template <class S>
struct MeanParams {
  Move<S> moves[kMovesAtOnce];
  unsigned first_block[kMovesAtOnce + 1];
  index_t rows;
  MeanLoss<S> loss;  // by the first block, if the tensors begin behind it
};

// A block takes 32 columns of a tensor, a warp every kMeanWarps-th row of them, and the warps' sums
// are added in order: a column alone has too few threads to keep memory busy.
constexpr int kMeanWarps = int(kThreads / kWarp);

template <class S>
FM_KERNEL void __launch_bounds__(kThreads, 1) mean_rows_kernel(const MeanParams<S> p) {
  await_previous_kernels();
  double* sums = shared_memory<double>();  // [kMeanWarps, kWarp]
  if (blockIdx.x < p.first_block[0]) return p.loss.by_block(sums);
  int tensor = 0;
  while (blockIdx.x >= p.first_block[tensor + 1]) ++tensor;
  const Move<S>& m = p.moves[tensor];
  const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp);
  const index_t e = index_t(blockIdx.x - p.first_block[tensor]) * kWarp + lane;
  double sum = 0;
  index_t to = e;
  if (e < m.n) {
    if (warp == 0 && m.index) to = m.index[e];
    FM_UNROLL_BY_FOUR
    for (index_t t = warp; t < p.rows; t += kMeanWarps) sum += double(m.src.of(t)[e]);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || e >= m.n) return;
  for (int i = 1; i < kMeanWarps; ++i) sum += sums[i * int(kWarp) + lane];
  m.dst.data[to] = S(sum / double(p.rows));
}

template <class S>
void mean_tensors(const Move<S>* moves, index_t count, index_t tasks, const TaskLosses<S>& losses,
                  const Exec& exec) {
  require(count <= kMovesAtOnce, "means: expected at most ", kMovesAtOnce, " tensors, got ", count);
  MeanParams<S> p{};
  p.rows = tasks;
  index_t blocks = losses.out ? 1 : 0;
  p.first_block[0] = unsigned(blocks);
  for (index_t i = 0; i < count; ++i) {
    p.moves[i] = moves[i];
    blocks += divide_up(moves[i].n, kWarp);
    require(blocks < (index_t(1) << 31), "mean over tasks: expected fewer than 2^31 blocks");
    p.first_block[i + 1] = unsigned(blocks);
  }
  if (blocks == 0) return;
  if (losses.out) p.loss = MeanLoss<S>::of(tasks, losses);
  constexpr std::size_t kShared = kThreads * sizeof(double);
  launch(mean_rows_kernel<S>, unsigned(blocks), kThreads, kShared, exec, p);
  for (index_t first = kLossWeights; losses.out && first < losses.n; first += kLossWeights) {
    p.loss = MeanLoss<S>::of(tasks, losses, first);
    launch(mean_rows_kernel<S>, 1, kThreads, kShared, exec, p);
  }
}

template <class S>
void mean_rows(index_t rows, index_t n, index_t begin, index_t end, const S* values, S* out,
               const Exec& exec) {
  const Move<S> all{end - begin, nullptr, {values + begin, n}, {out + begin, 0}};
  mean_tensors<S>(&all, 1, rows, {}, exec);
}

template <class S>
struct RateParams {
  int rows, n;
  const std::uint8_t* adapted;
  const S* values;
  bool per_tensor, sum;
  S* out;
};

// A thread takes a rate, or with `sum` those of a step.
template <class S>
FM_KERNEL void rate_table_kernel(const RateParams<S> p) {
  await_previous_kernels();
  const int item = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (item >= (p.sum ? p.rows : p.rows * p.n)) return;
  if (!p.sum) {
    const S value = p.values[p.per_tensor ? item : item / p.n];
    p.out[item] = p.adapted[item % p.n] ? value : S(0);
    return;
  }
  S sum = 0;
  for (int i = 0; i < p.n; ++i) sum += p.adapted[i] ? p.values[item * p.n + i] : S(0);
  p.out[item] = sum;
}

template <class S>
void rate_table(const RateParams<S>& p, const Exec& exec) {
  const index_t items = p.sum ? p.rows : index_t(p.rows) * p.n;
  launch(rate_table_kernel<S>, flat_blocks(items, "inner rates"), kThreads, 0, exec, p);
}

template <class S>
void spread_rates(index_t rows, index_t n, const std::uint8_t* adapted, const S* values,
                  bool per_tensor, S* out, const Exec& exec) {
  rate_table<S>({int(rows), int(n), adapted, values, per_tensor, false, out}, exec);
}

template <class S>
void collect_rates(index_t rows, index_t n, const std::uint8_t* adapted, const S* values,
                   bool per_tensor, S* out, const Exec& exec) {
  rate_table<S>({int(rows), int(n), adapted, values, true, !per_tensor, out}, exec);
}

// -- moves ----------------------------------------------------------------------------------------

template <class S>
struct MoveParams {
  Move<S> moves[kMovesAtOnce];
};

template <class S, bool Scatter>
FM_KERNEL void __launch_bounds__(kThreads, 1) move_kernel(const MoveParams<S> p) {
  await_previous_kernels();
  const Move<S>& m = p.moves[blockIdx.y];
  const S* src = m.src.of(blockIdx.z);
  S* dst = m.dst.of(blockIdx.z);
  const index_t first = index_t(blockIdx.x) * kThreads * kEach + threadIdx.x;
  FM_UNROLL
  for (int k = 0; k < kEach; ++k) {
    const index_t i = first + k * index_t(kThreads);
    if (i >= m.n) return;
    const index_t other = m.index ? m.index[i] : i;
    if constexpr (Scatter) {
      dst[other] = src[i];
    } else {
      dst[i] = src[other];
    }
  }
}

template <class S, bool Scatter>
void move(const Move<S>* moves, index_t count, index_t tasks, const Exec& exec) {
  require(count <= kMovesAtOnce, "moves: expected at most ", kMovesAtOnce, ", got ", count);
  MoveParams<S> p;
  index_t longest = 0;
  for (index_t i = 0; i < count; ++i) {
    p.moves[i] = moves[i];
    longest = max_of(longest, moves[i].n);
  }
  if (longest == 0 || tasks == 0) return;
  const dim3 grid(flat_blocks(divide_up(longest, kEach), "moves"), unsigned(count),
                  task_blocks(tasks));
  launch((move_kernel<S, Scatter>), grid, kThreads, 0, exec, p);
}

// A tile of channels and pixels goes through shared memory, so that reads and writes are of
// neighbours.
constexpr int kTilePixels = 64, kTileChannels = 16;

template <class S>
struct TransposeParams {
  const S* src;
  S* dst;
  int channels, pixels, across, down;  // tiles of an image
};

template <class S>
FM_KERNEL void __launch_bounds__(kThreads, 1) to_channels_last_kernel(const TransposeParams<S> p) {
  await_previous_kernels();
  S* tile = shared_memory<S>();  // [kTileChannels, kTilePixels + 1]
  const unsigned tiles = unsigned(p.across) * unsigned(p.down);
  const int place = int(blockIdx.x % tiles);
  const index_t image = index_t(blockIdx.x / tiles) * p.channels * p.pixels;
  const int p0 = place % p.across * kTilePixels, c0 = place / p.across * kTileChannels;
  const int pixels = min_of(kTilePixels, p.pixels - p0);
  const int channels = min_of(kTileChannels, p.channels - c0);
  for (int i = int(threadIdx.x); i < channels * kTilePixels; i += int(kThreads)) {
    const int c = i / kTilePixels, q = i % kTilePixels;
    if (q < pixels) {
      tile[c * (kTilePixels + 1) + q] = p.src[image + index_t(c0 + c) * p.pixels + p0 + q];
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < channels * pixels; i += int(kThreads)) {
    const int q = i / channels, c = i % channels;
    p.dst[image + index_t(p0 + q) * p.channels + c0 + c] = tile[c * (kTilePixels + 1) + q];
  }
}

template <class S>
void to_channels_last(index_t n, index_t channels, index_t pixels, const S* src, S* dst,
                      const Exec& exec) {
  const index_t across = divide_up(pixels, kTilePixels), down = divide_up(channels, kTileChannels);
  const index_t blocks = n * across * down;
  require(blocks < (index_t(1) << 31), "images: expected fewer than 2^31 tiles, got ", blocks);
  if (blocks == 0) return;
  launch(to_channels_last_kernel<S>, unsigned(blocks), kThreads,
         kTileChannels * (kTilePixels + 1) * sizeof(S), exec,
         TransposeParams<S>{src, dst, int(channels), int(pixels), int(across), int(down)});
}

}  // namespace

template <class S>
VectorOps<S> vector_ops() {
  return {descend<S>,      scale_by_rates<S>,
          segment_dots<S>, negative_product<S>,
          update<S>,       fill<S>,
          copy<S>,         add<S>,
          mean_rows<S>,    nullptr,
          mean_tensors<S>, move<S, false>,
          move<S, true>,   to_channels_last<S>,
          spread_rates<S>, collect_rates<S>,
          nullptr};
}

template VectorOps<float> vector_ops();
template VectorOps<double> vector_ops();

}  // namespace FM_CUDA
