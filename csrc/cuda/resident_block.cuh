// A resident task, as its block goes through it (task_resident.cu has the formulas).
//
// A pass over L stages has 2 L - 1 barriers (of one stage, two). Forward, each stage is a product
// and a barrier; the last one, whose outputs the loss needs together, gives a sample to kDotLanes
// lanes, which go on to its loss and, without a barrier, to the adjoint of its inputs. Backward,
// between two barriers stand the adjoint of stage l (it reads w_l, or in a tangent also lambda_l)
// and the update of stage l + 1 (it writes w or lambda there), which have nothing in common; stages
// 1 and 0 are updated together. The loss is summed up beside the adjoints.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/resident_products.cuh"
#include "cuda/resident_stage.cuh"
#include "cuda/sample_loss.cuh"
#include "cuda/tile.cuh"

namespace FM_CUDA {

// Parameters, tensors in the model's layout: weights [out, in]; one pair a stage.
template <class S>
struct ResidentTensors {
  const S *weight[kResidentStages], *bias[kResidentStages];
};

template <class S>
struct ResidentParams {
  ResidentLayout<S> layout;
  ResidentTensors<S> theta;
  const S* rates;               // [rate_rows, segments], or [rate_rows]
  const std::uint8_t* adapted;  // [segments]
  const S *support_x, *query_x;
  const void *support_y, *query_y;
  double *loss, *accuracy;  // [T, K + 1]
  S* rows;                  // [T, row] meta-gradients, in the model's order
  index_t row;
  S support_scale, query_scale;  // of the loss
  bool rate_per_tensor;
};

constexpr std::size_t kParamsOfAKernel = 4096;  // bytes, before CUDA 12.1
static_assert(sizeof(ResidentParams<double>) <= kParamsOfAKernel, "fits the constant bank");

template <class S, class Loss>
class ResidentBlock {
 public:
  FM_DEVICE explicit ResidentBlock(const ResidentParams<S>& p)
      : p_(p), at_(p.layout), memory_(shared_memory<S>()), task_(int(blockIdx.x)) {}

  FM_DEVICE void run() {
    load();
    const int K = at_.steps;
    FM_NO_UNROLL
    for (int i = 0; i <= 2 * K; ++i) {
      const bool inner = i < K;
      const int k = inner ? i : 2 * K - i;
      if (inner || at_.weights[k] != S(0)) gradient(k, inner);
      if (!inner && k > 0 && !at_.first_order) chain_step(k - 1);
    }
    store();
  }

 private:
  using Stage = ResidentStage<S>;
  struct Targets {  // of samples, for Loss
    const void* target;
    S scale;
    int outputs;
  };

  FM_DEVICE S* set(int k) const { return memory_ + at_.sets + k * at_.set; }
  FM_DEVICE S* lambda() const { return memory_ + at_.lambda; }
  FM_DEVICE S* tape(int k) const {
    return memory_ + at_.tapes + (at_.first_order ? 0 : k) * at_.tape;
  }
  FM_DEVICE S* late() const { return memory_ + at_.late; }
  FM_DEVICE const S* rates(int k) const {
    return memory_ + at_.rates + min_of(k, at_.rate_rows - 1) * at_.segments;
  }
  FM_DEVICE const Stage& last() const { return at_.stages[at_.depth - 1]; }
  // what stage l reads: x, or what the stage before left
  FM_DEVICE const S* input(int l, const ResidentSamples& samples, const S* tape) const {
    return l > 0 ? tape + at_.stages[l - 1].a : memory_ + samples.x;
  }
  FM_DEVICE Targets targets(bool support) const {
    const ResidentSamples& samples = support ? at_.support : at_.query;
    return {memory_ + samples.y, support ? p_.support_scale : p_.query_scale, last().outputs()};
  }

  // ---------------------------------------------------------------------- in and out

  // Everything at once, so that its latencies overlap.
  FM_DEVICE void load() const {
    FM_NO_UNROLL
    for (int l = 0; l < at_.depth; ++l) {
      const Stage& s = at_.stages[l];
      const int n = s.inputs() * s.outputs();
      for (int e = int(threadIdx.x); e < n; e += int(kResidentThreads)) {
        copy_async<sizeof(S)>(set(0) + s.w + place(s, e), p_.theta.weight[l] + e, true);
      }
      if (!s.has_bias()) continue;
      for (int o = int(threadIdx.x); o < s.outputs(); o += int(kResidentThreads)) {
        copy_async<sizeof(S)>(set(0) + s.b + o, p_.theta.bias[l] + o, true);
      }
    }
    load(at_.support, p_.support_x, p_.support_y);
    load(at_.query, p_.query_x, p_.query_y);
    copy_async_commit();
    for (int e = int(threadIdx.x); e < at_.rate_rows * at_.segments; e += int(kResidentThreads)) {
      const int row = e / at_.segments, i = e - row * at_.segments;
      const S rate = p_.rates[p_.rate_per_tensor ? e : row];
      memory_[at_.rates + e] = p_.adapted[i] ? rate : S(0);
    }
    if (at_.weights[at_.steps] == S(0)) {
      for (int e = int(threadIdx.x); e < at_.set; e += int(kResidentThreads)) lambda()[e] = S(0);
    }
    copy_async_wait<0>();
    __syncthreads();
  }

  FM_DEVICE void load(const ResidentSamples& samples, const S* x, const void* y) const {
    const Stage& s = at_.stages[0];
    const int n = samples.count * s.inputs();
    x += index_t(task_) * n;
    for (int e = int(threadIdx.x); e < n; e += int(kResidentThreads)) {
      const int sample = s.in.quotient(e), i = e - sample * s.inputs();
      copy_async<sizeof(S)>(memory_ + samples.x + sample * s.x_row + i, x + e, true);
    }
    const char* from = static_cast<const char*>(y) + index_t(task_) * samples.y_words * 4;
    char* to = reinterpret_cast<char*>(memory_ + samples.y);
    for (int e = int(threadIdx.x); e < samples.y_words; e += int(kResidentThreads)) {
      copy_async<4>(to + e * 4, from + e * 4, true);
    }
  }

  // Where element e of a model's weight [out, in] is in w [in, out].
  static FM_DEVICE int place(const Stage& s, int e) {
    const int o = s.in.quotient(e), i = e - o * s.inputs();
    return i * s.w_row + o;
  }

  FM_DEVICE void store() const {
    S* row = p_.rows + task_ * p_.row;
    FM_NO_UNROLL
    for (int l = 0; l < at_.depth; ++l) {
      const Stage& s = at_.stages[l];
      const int n = s.inputs() * s.outputs();
      for (int e = int(threadIdx.x); e < n; e += int(kResidentThreads)) {
        row[s.weight + e] = lambda()[s.w + place(s, e)];
      }
      if (!s.has_bias()) continue;
      for (int o = int(threadIdx.x); o < s.outputs(); o += int(kResidentThreads)) {
        row[s.bias + o] = lambda()[s.b + o];
      }
    }
  }

  // ---------------------------------------------------------------------- gradients

  // theta_{k+1} = theta_k - a_k (.) g_s(theta_k), or lambda (+)= w_k g_q(theta_k)
  FM_DEVICE void gradient(int k, bool inner) const {
    const ResidentSamples& samples = inner ? at_.support : at_.query;
    const S* theta = set(k);
    S* tape = inner ? this->tape(k) : late();
    const Target<S> target =
        inner ? Target<S>{set(k + 1), theta, S(-1), rates(k)}
              : Target<S>{lambda(), k == at_.steps ? nullptr : lambda(), at_.weights[k], nullptr};
    const int count = samples.count;
    FM_NO_UNROLL
    for (int l = 0; l + 1 < at_.depth; ++l) {
      const Stage& s = at_.stages[l];
      const S* x = input(l, samples, tape);
      columns<S>(
          count, s.out, s.inputs(), s.x_row, x, {theta + s.w, s.w_row, 1}, S(1), nullptr, {},
          [&](int o) { return s.has_bias() ? theta[s.b + o] : S(0); },
          [&](int n, int o, const S(&z)[kTileSamples]) { put_output(s, tape, n, o, count, z); });
      __syncthreads();
    }
    loss(inner, theta, tape);
    __syncthreads();
    FM_NO_UNROLL
    for (int l = first_update(); l >= 0; --l) {
      if (l > 0) {
        const Stage &s = at_.stages[l], &before = at_.stages[l - 1];
        columns<S>(
            count, s.in, s.outputs(), s.row, tape + s.d, {theta + s.w, 1, s.w_row}, S(1), nullptr,
            {}, [](int) { return S(0); },
            [&](int n, int i, const S(&da)[kTileSamples]) {
              FM_UNROLL
              for (int m = 0; m < kTileSamples; ++m) {
                const int e = (n + m) * before.row + i;
                if (n + m < count) put_adjoint(before, tape, e, da[m]);
              }
            });
      }
      if (!inner && l == first_update()) sum_losses(k);
      FM_NO_UNROLL
      for (int u = l + 1; u >= (l == 0 ? 0 : l + 1); --u) {
        if (u == at_.depth) continue;
        update<S>(at_.stages[u], count, turn(u), input(u, samples, tape), tape + at_.stages[u].d,
                  nullptr, nullptr, target);
      }
      __syncthreads();
    }
  }

  // The stage whose adjoint stands beside the first update, that of the last stage.
  FM_DEVICE int first_update() const { return max_of(at_.depth - 2, 0); }

  // Stage 0 from the first thread on, the others from the last one back.
  static FM_DEVICE int turn(int stage) {
    return stage == 0 ? int(threadIdx.x) : int(kResidentThreads - 1 - threadIdx.x);
  }

  // Calls body(n, lane of the sample) for the samples of a warp, by all lanes of each sample; lanes
  // beyond the samples come along with the last one, as lane kDotLanes.
  template <class Body>
  static FM_DEVICE void by_dots(int count, Body&& body) {
    const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp);
    FM_NO_UNROLL
    for (int base = warp * kDotsOfWarp; base < count;
         base += int(kResidentThreads / kWarp) * kDotsOfWarp) {
      const int n = base + lane / kDotLanes;
      body(min_of(n, count - 1), n < count ? lane % kDotLanes : kDotLanes);
    }
  }

  // The last stage and the loss: dz, for the query what sum_losses adds up, and dx.
  FM_DEVICE void loss(bool inner, const S* theta, S* tape) const {
    const ResidentSamples& samples = inner ? at_.support : at_.query;
    const Stage& s = last();
    const S* x = input(at_.depth - 1, samples, tape);
    by_dots(samples.count, [&](int n, int lane) {
      const bool first = lane == 0;
      FM_NO_UNROLL
      for (int o = 0; o < s.outputs(); ++o) {
        S z = dot<S>(s.inputs(), x + n * s.x_row, {theta + s.w, s.w_row, 1}, S(1), nullptr, {}, o);
        if (s.has_bias()) z += theta[s.b + o];
        if (first) put_activation(s, tape, n * s.row + o, z);
      }
      if (first) loss_of(inner, n, tape);
      if (at_.depth == 1) return;
      __syncwarp();
      const Stage& before = at_.stages[at_.depth - 2];
      for (int i = lane; lane < kDotLanes && i < s.inputs(); i += kDotLanes) {
        const S da = short_dot<S>(s.outputs(), tape + s.d + n * s.row, theta + s.w + i * s.w_row,
                                  S(1), nullptr, nullptr);
        put_adjoint(before, tape, n * before.row + i, da);
      }
    });
  }

  FM_DEVICE void loss_of(bool inner, int n, S* tape) const {
    const Stage& s = last();
    S* dz = tape + s.d + n * s.row;
    const SampleLoss found = Loss::value(targets(inner), n, tape + s.a + n * s.row, dz);
    if (s.slope >= 0) {
      for (int o = 0; o < s.outputs(); ++o) put_adjoint(s, tape, n * s.row + o, dz[o]);
    }
    if (inner) return;
    double* values = reinterpret_cast<double*>(memory_);
    values[n] = found.value;
    if (Loss::kAccuracy) values[at_.query.count + n] = double(found.hit);
  }

  // By the last warp, which has least to do meanwhile.
  FM_DEVICE void sum_losses(int k) const {
    if (threadIdx.x < kResidentThreads - kWarp) return;
    const double* values = reinterpret_cast<const double*>(memory_);
    const int count = at_.query.count, lane = int(threadIdx.x % kWarp);
    double value = 0, hits = 0;
    for (int n = lane; n < count; n += int(kWarp)) {
      value += values[n];
      if (Loss::kAccuracy) hits += values[count + n];
    }
    value = warp_sum(value);
    if (Loss::kAccuracy) hits = warp_sum(hits);
    if (lane != 0) return;
    const index_t at = index_t(task_) * (at_.steps + 1) + k;
    p_.loss[at] = value;
    p_.accuracy[at] = Loss::kAccuracy ? hits / double(count) : not_a_number<double>();
  }

  // ---------------------------------------------------------------------- the chain

  // lambda -= H_s(theta_k) [a_k (.) lambda], from the tape of the inner step
  FM_DEVICE void chain_step(int k) const {
    const ResidentSamples& samples = at_.support;
    const S *theta = set(k), *v = lambda(), *a_k = rates(k);
    S *tape = this->tape(k), *tangent = late();
    const int count = samples.count;
    FM_NO_UNROLL
    for (int l = 0; l + 1 < at_.depth; ++l) {
      const Stage& s = at_.stages[l];
      const S* tx = l > 0 ? tangent + at_.stages[l - 1].ta : nullptr;
      columns<S>(
          count, s.out, s.inputs(), s.x_row, input(l, samples, tape), {v + s.w, s.w_row, 1},
          a_k[s.segment], tx, {theta + s.w, s.w_row, 1},
          [&](int o) { return s.has_bias() ? a_k[s.segment + 1] * v[s.b + o] : S(0); },
          [&](int n, int o, const S(&tz)[kTileSamples]) {
            FM_UNROLL
            for (int m = 0; m < kTileSamples; ++m) {
              if (n + m < count) put_tangent(s, tape, tangent, (n + m) * s.row + o, tz[m]);
            }
          });
      __syncthreads();
    }
    loss_hessian(theta, a_k, tape, tangent);
    __syncthreads();
    const Target<S> target{lambda(), lambda(), S(-1), nullptr};
    FM_NO_UNROLL
    for (int l = first_update(); l >= 0; --l) {
      if (l > 0) {
        const Stage &s = at_.stages[l], &before = at_.stages[l - 1];
        columns<S>(
            count, s.in, s.outputs(), s.row, tape + s.d, {v + s.w, 1, s.w_row}, a_k[s.segment],
            tangent + s.td, {theta + s.w, 1, s.w_row}, [](int) { return S(0); },
            [&](int n, int i, const S(&tda)[kTileSamples]) {
              FM_UNROLL
              for (int m = 0; m < kTileSamples; ++m) {
                const int e = (n + m) * before.row + i;
                if (n + m < count) put_tangent_adjoint(before, tape, tangent, e, tda[m]);
              }
            });
      }
      FM_NO_UNROLL
      for (int u = l + 1; u >= (l == 0 ? 0 : l + 1); --u) {
        if (u == at_.depth) continue;
        const Stage& s = at_.stages[u];
        update<S>(s, count, turn(u), input(u, samples, tape), tangent + s.td,
                  u > 0 ? tangent + at_.stages[u - 1].ta : nullptr, tape + s.d, target);
      }
      __syncthreads();
    }
  }

  FM_DEVICE void loss_hessian(const S* theta, const S* a_k, const S* tape, S* tangent) const {
    const Stage& s = last();
    const S *v = lambda(), *x = input(at_.depth - 1, at_.support, tape);
    const S* tx = at_.depth > 1 ? tangent + at_.stages[at_.depth - 2].ta : nullptr;
    by_dots(at_.support.count, [&](int n, int lane) {
      const int in = n * s.x_row, row = n * s.row;
      FM_NO_UNROLL
      for (int o = 0; o < s.outputs(); ++o) {
        S tz = dot<S>(s.inputs(), x + in, {v + s.w, s.w_row, 1}, a_k[s.segment],
                      tx ? tx + in : nullptr, {theta + s.w, s.w_row, 1}, o);
        if (s.has_bias()) tz += a_k[s.segment + 1] * v[s.b + o];
        if (lane == 0) put_tangent(s, tape, tangent, row + o, tz);
      }
      if (lane == 0) hessian_of(n, tape, tangent);
      if (at_.depth == 1) return;
      __syncwarp();
      const Stage& before = at_.stages[at_.depth - 2];
      for (int i = lane; lane < kDotLanes && i < s.inputs(); i += kDotLanes) {
        const int w = s.w + i * s.w_row;
        const S tda = short_dot<S>(s.outputs(), tape + s.d + row, v + w, a_k[s.segment],
                                   tangent + s.td + row, theta + w);
        put_tangent_adjoint(before, tape, tangent, n * before.row + i, tda);
      }
    });
  }

  FM_DEVICE void hessian_of(int n, const S* tape, S* tangent) const {
    const Stage& s = last();
    const int row = n * s.row;
    S* tdz = tangent + s.td + row;
    Loss::hessian(targets(true), n, tape + s.a + row, tangent + s.ta + row, tdz);
    if (s.slope < 0) return;
    for (int o = 0; o < s.outputs(); ++o) put_tangent_adjoint(s, tape, tangent, row + o, tdz[o]);
  }

  const ResidentParams<S>& p_;
  const ResidentLayout<S>& at_;
  S* memory_;
  int task_;
};

}  // namespace FM_CUDA
