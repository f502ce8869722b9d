// Where everything of a resident task is (task_resident.cu says what that is): which programs and
// calls fit, and offsets into the block's shared memory.
//
// A program is resident if it is a chain of stages, each a linear layer of vectors and at most one
// activation. Parameters are kept once, w [in, out] with rows of an odd number of elements: lanes
// that run over columns (x w) and lanes that run over rows (d w^T) both meet 32 different banks.
// Rows of samples hold whole packs of 16 bytes, which a warp reads by broadcast, and their number
// is rounded up to whole tiles; what is beyond the samples is computed with and never stored.
//
//   values     loss and hit of every query sample, double [2, Q]
//   y, x       of the support and of the query
//   rates      [rate_rows, tensors]
//   sets       theta_0 .. theta_K, lambda
//   tapes      one for each inner step, or one in all (first order)
//   late       the query's tape, and the tangents: never alive together
//
// A tape holds, for each stage, what later passes read of z = x w + b: a = f(z), f'(z), d (the
// adjoint of z), and where f is curved f''(z) and da as well. So activations are computed once.
#pragma once

#include "cuda/launch.h"
#include "program/backend.h"
#include "program/program.h"

namespace FM_CUDA {

constexpr int kResidentStages = 8, kResidentSteps = 32, kResidentWidth = 4096;
// Samples in a tile of the products, and threads of a block.
constexpr int kTileSamples = 4;
constexpr unsigned kResidentThreads = 256;
// Multiply-adds of the largest product: beyond, one multiprocessor takes longer for it than a
// launch over all of them. Predicted, not measured.
constexpr index_t kResidentWork = index_t(1) << 18;

// Quotients by a number that is known at launch, for n * by < 2^31.
struct Divisor {
  unsigned by = 1, magic = 0;
  static Divisor of(int by) { return {unsigned(by), (1u << 31) / unsigned(by) + 1}; }
  FM_INLINE int quotient(int n) const { return int((std::uint64_t(n) * magic) >> 31); }
};

template <class S>
struct ResidentStage {
  LayerKind activation;  // bilinear: none
  S alpha;
  Divisor in, out;
  int x_row, row, w_row;       // elements from row to row: of the input, of all else, of w
  int w, b;                    // in a set; b < 0: no bias
  int a, slope, curve, da, d;  // in a tape; slope < 0: f' = 1, curve < 0: f'' = 0
  int tz, ta, td;              // in a tangent; without a slope tz is ta
  int weight, bias;            // in a task's row of results, in the model's order
  int segment;                 // of the weight's rate; the bias' follows

  FM_INLINE bool has_bias() const { return b >= 0; }
  FM_INLINE int inputs() const { return int(in.by); }
  FM_INLINE int outputs() const { return int(out.by); }
};

// Where samples are in shared memory.
struct ResidentSamples {
  int count, x, y, y_words;  // y_words: words of 4 bytes
};

template <class S>
struct ResidentLayout {
  ResidentStage<S> stages[kResidentStages];
  ResidentSamples support, query;
  int depth, steps, segments, rate_rows;
  bool first_order;
  int rates, sets, set, lambda, tapes, tape, late, size;  // elements of S
  S weights[kResidentSteps + 1];                          // of the query losses

  // False: this call goes through its layers one by one.
  bool plan(const ResidentCall<S>& call) {
    *this = {};
    return read(*call.program, call) && place(*call.program, call);
  }
  std::size_t bytes() const { return std::size_t(size) * sizeof(S); }

 private:
  static constexpr int kPackOf = int(16 / sizeof(S));

  // Hands out room in multiples of 16 bytes.
  struct Room {
    index_t size = 0;
    int take(index_t elements) {
      const index_t offset = size;
      size += align_up(elements, kPackOf);
      return int(offset);
    }
    int take_words(index_t words) { return take((words * 4 + sizeof(S) - 1) / sizeof(S)); }
  };

  static bool activates(LayerKind kind) {
    return kind >= LayerKind::relu && kind <= LayerKind::softplus;
  }
  static bool curved(LayerKind kind) {
    return activates(kind) && kind != LayerKind::relu && kind != LayerKind::leaky_relu;
  }

  bool read(const Program& program, const ResidentCall<S>& call) {
    const LossKind loss = program.loss();
    if (loss != LossKind::squared_error && loss != LossKind::cross_entropy &&
        loss != LossKind::gaussian_policy) {
      return false;
    }
    if (call.steps > kResidentSteps) return false;
    const index_t samples = max_of(call.support, call.query);
    for (const LayerDesc& d : program.layers()) {
      if (d.dense() && d.in.pixels() == 1) {
        const index_t in = d.in.channels, out = d.out.channels;
        if (depth == kResidentStages || max_of(in, out) > kResidentWidth) return false;
        if (samples * in * out > kResidentWork) return false;
        ResidentStage<S>& s = stages[depth++];
        s.activation = d.relu ? LayerKind::relu : LayerKind::bilinear;
        s.in = Divisor::of(int(in));
        s.out = Divisor::of(int(out));
        s.b = d.has_bias ? 0 : -1;
        s.weight = int(d.param_offset);
        s.bias = int(d.param_offset + d.bias_offset);
        s.segment = int(d.segment);
        continue;
      }
      if (!activates(d.kind) || depth == 0) return false;
      ResidentStage<S>& s = stages[depth - 1];
      if (s.activation != LayerKind::bilinear) return false;
      s.activation = d.kind;
      s.alpha = S(d.alpha);
    }
    return depth > 0;
  }

  bool place(const Program& program, const ResidentCall<S>& call) {
    const index_t rows = align_up(max_of(call.support, call.query), kTileSamples);
    const auto row_of = [](int width) { return int(align_up(width, kPackOf)); };
    Room parameters, pass, tangent;
    for (int l = 0; l < depth; ++l) {
      ResidentStage<S>& s = stages[l];
      s.x_row = row_of(s.inputs());
      s.row = row_of(s.outputs());
      s.w_row = s.outputs() | 1;
      s.w = parameters.take(index_t(s.inputs()) * s.w_row);
      if (s.has_bias()) s.b = parameters.take(s.outputs());
      const index_t n = rows * s.row;
      const bool active = activates(s.activation), bent = curved(s.activation);
      s.a = pass.take(n);
      s.d = pass.take(n);
      s.slope = active ? pass.take(n) : -1;
      s.curve = bent ? pass.take(n) : -1;
      s.da = bent ? pass.take(n) : -1;
      s.ta = tangent.take(n);
      s.td = tangent.take(n);
      s.tz = bent ? tangent.take(n) : s.ta;
    }
    steps = int(call.steps);
    first_order = call.first_order;
    segments = int(program.segments().size());
    rate_rows = int(call.rate_rows);
    for (int k = 0; k <= steps; ++k) weights[k] = S(call.loss_weights[k]);

    const index_t element =
        program.loss() == LossKind::cross_entropy ? sizeof(std::int64_t) : sizeof(S);
    const index_t y_words = program.target_size() * element / 4;
    Room all;
    all.take_words(2 * 2 * call.query);
    const auto samples = [&](ResidentSamples& s, index_t count) {
      s.count = int(count);
      s.y_words = int(count * y_words);
      s.y = all.take_words(s.y_words);
      s.x = all.take(align_up(count, kTileSamples) * stages[0].x_row);
    };
    samples(support, call.support);
    samples(query, call.query);
    rates = all.take(index_t(rate_rows) * segments);
    set = int(parameters.size);
    sets = all.take(parameters.size * (steps + 1));
    lambda = all.take(parameters.size);
    tape = int(pass.size);
    tapes = all.take(pass.size * (first_order ? min_of(steps, 1) : steps));
    late = all.take(max_of(pass.size, tangent.size));
    size = int(all.size);
    return all.size * index_t(sizeof(S)) <= index_t(shared_memory_of_a_block());
  }
};

}  // namespace FM_CUDA
