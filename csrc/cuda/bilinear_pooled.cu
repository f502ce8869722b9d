// dw of a first layer below a batch norm with 2 x 2 pooling: the adjoint of the layer's outputs is
// never written, but mapped in shared memory from what it hangs on.
//
// It is an affine function of those outputs, channel by channel (norm.cuh's input_adjoint), whose
// coefficients the norm's backward pass has left in `saved` and `w`, but for the winners of
// windows, where the adjoint of the pooled outputs enters. So the steps of the sum go window by
// window, and a tile's stage holds, besides the gathered inputs,
//
//   b        [steps, columns]        outputs of this layer, then their adjoint in place
//   windows  [2, steps / 4, columns] the winners' x and the adjoint of what was pooled
//
// All of it is copied ahead; a tile is mapped between two barriers, each element by one thread.
// Memory moved: outputs once instead of twice, and no write of their adjoint.
#include "cuda/bilinear_kernel.cuh"
#include "cuda/norm_launch.cuh"

namespace FM_CUDA {
namespace {

constexpr int kWindow = 4;  // pixels

template <class S>
struct PooledProduct {
  Product<S> product;
  NormParams<S> norm;
  const S *winners, *dy;  // [T, windows, C]
  index_t winners_stride, dy_stride;
  Divisor by_windows;  // of a row
};

template <class S, class Loop>
struct PooledFeed : Feed<S, Loop, Form::weights> {
  using Base = Feed<S, Loop, Form::weights>;
  using Base::begin, Base::depth, Base::kK, Base::kN, Base::kUnit, Base::n0, Base::p, Base::table;
  using L = typename Base::L;
  static constexpr int kWindows = kK / kWindow, kBoth = 2 * kWindows * kN;
  static constexpr int kAcross = kK * kN / kWindow / kProductThreads;  // channels of a thread
  static_assert(kAcross * kWindow * kProductThreads == kK * kN, "every thread has a window");

  const PooledProduct<S>& q;
  S* windows;    // [kStages, kBoth]
  int* sources;  // [2, kK]: where the steps of a tile lie among the outputs, or -1
  const S *winners, *dy;
  Channel<S> channels[kAcross];

  FM_DEVICE PooledFeed(const PooledProduct<S>& pooled, const PixelClass<Form::weights>& c,
                       const BlockTask<S, Form::weights>& at, S* shared)
      : Base(pooled.product, c, at, shared), q(pooled) {
    windows = shared + Loop::kStages * L::kStage;
    table = reinterpret_cast<PixelRow*>(windows + Loop::kStages * kBoth);
    sources = reinterpret_cast<int*>(table + Base::kTable);
    winners = q.winners + at.task * q.winners_stride;
    dy = q.dy + at.task * q.dy_stride;
    const NormParams<S>& n = q.norm;
#pragma unroll
    for (int v = 0; v < kAcross; ++v) {
      const int c = n0 + column() + v;
      channels[v] = {};
      if (c >= n.channels) continue;
      const S* saved = n.saved + at.task * n.saved_stride + c;
      const S found[] = {saved[2 * n.channels], saved[3 * n.channels]};
      channels[v] = channel_of<NormPass::backward>(n, at.task, c, found);
    }
  }

  static FM_DEVICE int column() { return int(threadIdx.x) % (kN / kAcross) * kAcross; }
  static FM_DEVICE int window() { return int(threadIdx.x) / (kN / kAcross); }

  // As Feed's, in the order of windows.
  FM_DEVICE void look_up_steps(int tile) {
    const ProductShape& s = p.shape;
    const int k = int(threadIdx.x);
    if (k >= kK) return;
    const int step = this->first_step(tile) + k;
    PixelRow row{0, kNowhere, kNowhere};
    int source = -1;
    if (step < depth) {
      const int sample = s.by_pixels.quotient(begin + step);
      const int place = begin + step - sample * int(s.by_pixels.value);
      const int line = q.by_windows.quotient(place / kWindow);
      const int py = 2 * line + place % kWindow / 2;
      const int px = 2 * (place / kWindow - line * int(q.by_windows.value)) + place % 2;
      row = pixel_row(s, this->pixels, sample, py, px);
      source = ((sample * s.pixel_height + py) * s.pixel_width + px) * s.columns;
    }
    table[tile % 2 * kK + k] = row;
    sources[tile % 2 * kK + k] = source;
  }

  template <int Unit>
  FM_DEVICE void copy_adjoint(S* to, S* both, int tile) const {
    using Share = typename Base::template ShareB<Unit>;
    const int column = n0 + Share::column(), pitch = p.shape.columns;
    const bool valid = column < pitch;
    const S* x = this->b0;
#pragma unroll 8
    for (int k = Share::row(); k < kK; k += Share::kStep) {
      const int source = sources[tile % 2 * kK + k];
      const bool inside = valid && source >= 0;
      copy_async<Unit* int(sizeof(S))>(to + k * L::kStrideB + Share::column(),
                                       inside ? x + (source + column) : x, inside);
    }
    const int first = this->first_step(tile), left = (depth - first) / kWindow;
    const index_t at = index_t((begin + first) / kWindow) * pitch + column;
    copy_matrix<kWindows, kN, kN, Unit>(both, winners + at, pitch, left, valid);
    copy_matrix<kWindows, kN, kN, Unit>(both + kBoth / 2, dy + at, pitch, left, valid);
  }

  FM_DEVICE void copy(int tile) const {
    S* to = this->stages + tile % Loop::kStages * L::kStage;
    S* both = windows + tile % Loop::kStages * kBoth;
    if (p.wide_a) {
      this->template copy_a<kUnit>(to, this->a0, tile, 0);
    } else {
      this->template copy_a<1>(to, this->a0, tile, 0);
    }
    if (p.wide_b) {
      copy_adjoint<kUnit>(to + L::kSizeA, both, tile);
    } else {
      copy_adjoint<1>(to + L::kSizeA, both, tile);
    }
  }

  // Turns a tile's outputs into their adjoint.
  FM_DEVICE void map(int tile) const {
    using V = Run<kAcross, S>;
    S* b = this->stages + tile % Loop::kStages * L::kStage + L::kSizeA +
           window() * kWindow * L::kStrideB + column();
    const S* both = windows + tile % Loop::kStages * kBoth + window() * kN + column();
    const bool inside = this->first_step(tile) + window() * kWindow < depth;
    const V winner = *reinterpret_cast<const V*>(both);
    const V pooled = *reinterpret_cast<const V*>(both + kBoth / 2);
    S h[kAcross];
    bool found[kAcross];
#pragma unroll
    for (int v = 0; v < kAcross; ++v) {
      S none = 0;
      scaled_adjoint<NormPass::backward>(channels[v], winner.v[v], pooled.v[v], S(0), h[v], none);
      found[v] = false;
    }
#pragma unroll
    for (int i = 0; i < kWindow; ++i) {
      V* at = reinterpret_cast<V*>(b + i * L::kStrideB);
      V x = *at;
#pragma unroll
      for (int v = 0; v < kAcross; ++v) {
        const bool here = !found[v] && x.v[v] == winner.v[v];
        found[v] |= here;
        const S dx =
            input_adjoint<NormPass::backward>(channels[v], x.v[v], S(0), here ? h[v] : S(0), S(0));
        x.v[v] = inside ? dx : S(0);
      }
      *at = x;
    }
  }
};

template <class S, class Loop>
FM_KERNEL void __launch_bounds__(kProductThreads, Loop::kMinBlocks)
    bilinear_pooled_kernel(const PooledProduct<S> q) {
  await_previous_kernels();
  using F = PooledFeed<S, Loop>;
  using L = typename F::L;
  constexpr int kStages = Loop::kStages;
  const Product<S>& p = q.product;
  S* shared = shared_memory<S>();
  const BlockTask<S, Form::weights> at(p, int(blockIdx.x));
  const PixelClass<Form::weights> pixels(p.shape, 0);
  F feed(q, pixels, at, shared);

  feed.look_up_steps(0);
  __syncthreads();
  const int tiles = feed.tiles();
#pragma unroll
  for (int t = 0; t < kStages - 1; ++t) {
    if (t < tiles) feed.copy(t);
    copy_async_commit();
    feed.look_up_steps(t + 1);
    __syncthreads();
  }
  ColumnSum<S, Loop::kTileN> bias;
  Loop loop;
  for (int t = 0; t < tiles; ++t) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    const int next = t + kStages - 1;
    if (next < tiles) feed.copy(next);
    copy_async_commit();
    feed.look_up_steps(next + 1);
    feed.map(t);
    __syncthreads();
    const S* stage = shared + t % kStages * L::kStage;
    loop.template multiply<L>(stage, stage + L::kSizeA, feed.depth - feed.first_step(t));
    if (p.bias_offset > 0) {
      bias.template add<Loop::kTileK, L::kStrideB>(stage + L::kSizeA);
    }
  }
  store_weights<L>(p, feed, at.group, at.task, loop, p.bias_offset > 0, bias, shared);
}

template <class S, class Loop>
void launch_pooled(PooledProduct<S>& q, index_t tasks, const Exec& exec) {
  using F = PooledFeed<S, Loop>;
  Product<S>& p = q.product;
  const index_t blocks = cut_into_tiles<Loop>(p, tasks);
  require(p.tiles_m == 1, "bilinear: ", p.shape.rows, " inputs of an output, at most ",
          Loop::kTileM, " expected below a norm whose adjoint is mapped here");
  constexpr std::size_t kShared = Loop::kStages * (F::L::kStage + F::kBoth) * sizeof(S) +
                                  F::kTable * (sizeof(PixelRow) + sizeof(int));
  launch(bilinear_pooled_kernel<S, Loop>, dim3(unsigned(blocks)), kProductThreads, kShared, exec,
         q);
}

}  // namespace

template <class S>
void launch_pooled_weights(Product<S> p, const LayerArgs<S>& norm, index_t tasks,
                           Arithmetic arithmetic, const Exec& exec) {
  const LayerDesc& d = *norm.desc;
  PooledProduct<S> q{};
  q.product = p;
  q.norm = norm_params(norm, static_cast<S*>(nullptr), exec);
  q.winners = norm.saved + align_up(6 * d.in.channels, 16);
  q.winners_stride = saved_count(d, norm.samples);
  q.dy = norm.dy;
  q.dy_stride = norm.samples * d.out.size();
  q.by_windows = Divisor(d.out.width);
  q.product.wide_b = p.wide_b && on_packs({q.winners, q.dy}) &&
                     on_packs({reinterpret_cast<const void*>(q.winners_stride * sizeof(S)),
                               reinterpret_cast<const void*>(q.dy_stride * sizeof(S))});
  if constexpr (sizeof(S) == 4) {
    switch (arithmetic) {
      case Arithmetic::split_tf32:
        return launch_pooled<S, TensorLoop<32, 32, 16, 16, 4, Arithmetic::split_tf32>>(q, tasks,
                                                                                       exec);
      case Arithmetic::tf32:
        return launch_pooled<S, TensorLoop<32, 32, 16, 16, 4, Arithmetic::tf32>>(q, tasks, exec);
      case Arithmetic::bfloat16:
        return launch_pooled<S, TensorLoop<32, 32, 16, 16, 4, Arithmetic::bfloat16>>(q, tasks,
                                                                                     exec);
      default:
        break;
    }
  }
  launch_pooled<S, ScalarLoop<S, 32, 32, 2, 4, 4>>(q, tasks, exec);
}

template void launch_pooled_weights(Product<float>, const LayerArgs<float>&, index_t, Arithmetic,
                                    const Exec&);
template void launch_pooled_weights(Product<double>, const LayerArgs<double>&, index_t, Arithmetic,
                                    const Exec&);

}  // namespace FM_CUDA
