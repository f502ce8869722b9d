// Outer optimizers: formulas in math/optimizer.h.
//
// A launch takes up to kTensors parameters, whose pointers travel with it: a block takes kChunk
// elements of one of them. Adam's step counters are in device memory, so that a captured step can
// be replayed. Every block works out its tensor's rule from the counter once, and says that it has
// read it by adding one to `arrivals`; the last block to arrive increments all counters, which
// nobody reads any more, and leaves `arrivals` at zero for the next launch.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pack.cuh"
#include "math/optimizer.h"

namespace FM_CUDA {
namespace {

constexpr int kTensors = 56, kEach = 4;
constexpr index_t kChunk = index_t(kThreads) * kEach;

template <class Tensor>
struct TensorList {
  Tensor tensors[kTensors];
  unsigned first_block[kTensors + 1];
  int count;

  // The tensor that a block works on.
  FM_DEVICE int of_block(unsigned block) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (block < first_block[middle] ? high : low) = middle;
    }
    return low;
  }
};

// Calls body(list, blocks) for lists of tensors that cover all. Empty ones have no blocks, but a
// list has one at least.
template <class Tensor, class Body>
void for_lists(const Tensor* tensors, index_t count, Body&& body) {
  for (index_t i = 0; i < count;) {
    TensorList<Tensor> list{};
    for (; i < count && list.count < kTensors; ++i) {
      list.tensors[list.count] = tensors[i];
      const index_t blocks = list.first_block[list.count] + divide_up(tensors[i].n, kChunk);
      require(blocks < (index_t(1) << 31), "optimizer: expected fewer than 2^31 blocks");
      list.first_block[++list.count] = unsigned(blocks);
    }
    body(list, max_of(1u, list.first_block[list.count]));
  }
}

template <class S>
struct AdamParams {
  TensorList<AdamTensor<S>> list;
  math::AdamOptions options;
  const double* lr;  // null: that of the options
  unsigned* arrivals;
};
static_assert(sizeof(AdamParams<float>) <= 4096, "parameters of a kernel are at most 4 KB");

template <class S>
struct AdamShared {
  math::AdamRule<S> rule;
  bool last;  // to arrive
};

template <class S>
struct AdamElement {
  S p, g, m, v, largest;

  FM_DEVICE void load(const AdamTensor<S>& t, index_t i) {
    p = t.p[i];
    g = t.g[i];
    m = t.m[i];
    v = t.v[i];
    if (t.largest) largest = t.largest[i];
  }

  template <bool Decay>
  FM_DEVICE void step(const math::AdamRule<S>& r, const AdamTensor<S>& t, index_t i) {
    const S slope = math::outer_gradient<Decay>(r.sign, r.decay, g, p);
    math::adam_moments(r, slope, m, v);
    t.m[i] = m;
    t.v[i] = v;
    S square = v;
    if (t.largest) {
      // NaN stays NaN, as it does in torch
      square = largest > square || largest != largest ? largest : square;
      t.largest[i] = square;
    }
    t.p[i] = math::adam_update(r, p, m, square);
  }
};

template <class S>
FM_KERNEL void __launch_bounds__(kThreads, 1) adam_kernel(const AdamParams<S> p) {
  await_previous_kernels();
  AdamShared<S>* shared = shared_memory<AdamShared<S>>();
  const int index = p.list.of_block(blockIdx.x);
  const AdamTensor<S>& t = p.list.tensors[index];
  const index_t first = index_t(blockIdx.x - p.list.first_block[index]) * kChunk + threadIdx.x;
  AdamElement<S> elements[kEach] = {};  // on their way while the rule is worked out
  FM_UNROLL
  for (int k = 0; k < kEach; ++k) {
    const index_t i = first + k * index_t(kThreads);
    if (i < t.n) elements[k].load(t, i);
  }
  if (threadIdx.x == 0) {
    const float step = *t.step + 1;
    __threadfence();  // read before it is said to be
    shared->last = atomicAdd(p.arrivals, 1u) + 1 == gridDim.x;
    math::AdamOptions options = p.options;
    if (p.lr) options.lr = *p.lr;
    shared->rule = math::adam_rule<S>(options, double(step));
  }
  __syncthreads();
  if (shared->last) {
    if (int(threadIdx.x) < p.list.count) *p.list.tensors[threadIdx.x].step += 1;
    if (threadIdx.x == 0) *p.arrivals = 0;
  }
  const math::AdamRule<S> r = shared->rule;
  FM_UNROLL
  for (int k = 0; k < kEach; ++k) {
    const index_t i = first + k * index_t(kThreads);
    if (i >= t.n) return;
    if (r.decay != S(0)) {
      elements[k].template step<true>(r, t, i);
    } else {
      elements[k].template step<false>(r, t, i);
    }
  }
}

template <class S>
void adam(const math::AdamOptions& options, const double* lr, unsigned* arrivals,
          const AdamTensor<S>* tensors, index_t count, const Exec& exec) {
  require(arrivals, "adam: expected an address of arrivals, got none");
  for_lists(tensors, count, [&](const TensorList<AdamTensor<S>>& list, unsigned blocks) {
    launch(adam_kernel<S>, blocks, kThreads, sizeof(AdamShared<S>), exec,
           AdamParams<S>{list, options, lr, arrivals});
  });
}

template <class S>
struct SgdParams {
  TensorList<SgdTensor<S>> list;
  math::SgdRule<S> rule;
  const double* lr;
};

template <class S, bool Decay>
FM_DEVICE void sgd_element(const math::SgdRule<S>& r, const SgdTensor<S>& t, index_t i) {
  const S before = t.p[i];
  S direction = math::outer_gradient<Decay>(r.sign, r.decay, t.g[i], before);
  if (t.buffer) {
    const S buffer = math::sgd_buffer(r, direction, r.first ? S(0) : t.buffer[i]);
    t.buffer[i] = buffer;
    direction = math::sgd_direction(r, direction, buffer);
  }
  t.p[i] = before - r.lr * direction;
}

template <class S>
FM_KERNEL void __launch_bounds__(kThreads, 1) sgd_kernel(const SgdParams<S> p) {
  await_previous_kernels();
  const int index = p.list.of_block(blockIdx.x);
  const SgdTensor<S>& t = p.list.tensors[index];
  math::SgdRule<S> r = p.rule;
  r.first = t.first;
  if (p.lr) r.lr = S(*p.lr);
  const index_t first = index_t(blockIdx.x - p.list.first_block[index]) * kChunk + threadIdx.x;
  FM_UNROLL
  for (int k = 0; k < kEach; ++k) {
    const index_t i = first + k * index_t(kThreads);
    if (i >= t.n) return;
    if (r.decay != S(0)) {
      sgd_element<S, true>(r, t, i);
    } else {
      sgd_element<S, false>(r, t, i);
    }
  }
}

template <class S>
void sgd(const math::SgdRule<S>& rule, const double* lr, const SgdTensor<S>* tensors, index_t count,
         const Exec& exec) {
  for_lists(tensors, count, [&](const TensorList<SgdTensor<S>>& list, unsigned blocks) {
    launch(sgd_kernel<S>, blocks, kThreads, 0, exec, SgdParams<S>{list, rule, lr});
  });
}

}  // namespace

template <class S>
OptimizerOps<S> optimizer_ops() {
  return {adam<S>, sgd<S>};
}

template OptimizerOps<float> optimizer_ops();
template OptimizerOps<double> optimizer_ops();

}  // namespace FM_CUDA
