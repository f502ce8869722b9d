// Where everything of a resident task is (resident.inl.h says what it is for).
//
// A program is resident if it is a chain of stages, each a linear layer of vectors and at most one
// activation, whose task takes a small slot. Parameters are kept twice, as w [in, out] for products
// with samples and as w^T [out, in] for adjoints; rows are padded to (half) vectors (rows.inl.h). A
// stage with one output has w^T alone, and if it is the last one, rows of one element; the first
// stage, whose input needs no adjoint, has w alone.
// Paddings hold nothing that reaches a real element.

namespace FM_KERNELS {

constexpr int kMaxStages = 8;
// A slot stays well within the second-level cache, and the largest product takes so little time
// that threads would not gain from sharing it.
constexpr index_t kResidentBytes = 384 << 10, kResidentWork = 4 * kWorthSharing;

struct ActivationOps {
  void (*forward)(index_t n, S alpha, const S* z, S* a);
  // out = f'(z) v
  void (*slope)(index_t n, S alpha, const S* z, const S* a, const S* v, S* out);
  // out = f''(z) tz da + f'(z) tda
  void (*curve)(index_t n, S alpha, const S* z, const S* a, const S* tz, const S* da, const S* tda,
                S* out);
};

template <class F>
struct Sweeps {
  static void forward(index_t n, S alpha, const S* FM_RESTRICT z, S* FM_RESTRICT a) {
    for (index_t i = 0; i < n; ++i) a[i] = F::f(z[i], alpha);
  }
  static void slope(index_t n, S alpha, const S* FM_RESTRICT z, const S* FM_RESTRICT a,
                    const S* FM_RESTRICT v, S* FM_RESTRICT out) {
    for (index_t i = 0; i < n; ++i) out[i] = F::df(z[i], a[i], alpha) * v[i];
  }
  static void curve(index_t n, S alpha, const S* FM_RESTRICT z, const S* FM_RESTRICT a,
                    const S* FM_RESTRICT tz, const S* FM_RESTRICT da, const S* FM_RESTRICT tda,
                    S* FM_RESTRICT out) {
    if constexpr (!F::kCurved) return slope(n, alpha, z, a, tda, out);
    for (index_t i = 0; i < n; ++i) {
      out[i] = F::d2f(z[i], a[i], alpha) * tz[i] * da[i] + F::df(z[i], a[i], alpha) * tda[i];
    }
  }
};

template <class F>
constexpr ActivationOps kSweeps{Sweeps<F>::forward, Sweeps<F>::slope, Sweeps<F>::curve};

inline const ActivationOps* activation_ops(LayerKind kind) {
  switch (kind) {
    case LayerKind::relu:
      return &kSweeps<math::Relu>;
    case LayerKind::leaky_relu:
      return &kSweeps<math::LeakyRelu>;
    case LayerKind::tanh:
      return &kSweeps<math::Tanh>;
    case LayerKind::sigmoid:
      return &kSweeps<math::Sigmoid>;
    case LayerKind::silu:
      return &kSweeps<math::Silu>;
    case LayerKind::gelu:
      return &kSweeps<math::Gelu>;
    case LayerKind::gelu_tanh:
      return &kSweeps<math::GeluTanh>;
    case LayerKind::elu:
      return &kSweeps<math::Elu>;
    case LayerKind::softplus:
      return &kSweeps<math::Softplus>;
    default:
      return nullptr;
  }
}

// A linear layer and what follows it. Offsets are in elements.
struct Stage {
  const LayerDesc* layer = nullptr;
  const ActivationOps* activation = nullptr;  // null: none, or a ReLU that the products apply
  S alpha = S(0);
  bool relu = false;  // applied where z is stored; products that lead back to z are masked by a > 0
  index_t in = 0, out = 0, in_row = 0, out_row = 0;
  index_t w = 0, wt = 0, b = 0;             // in a set of parameters
  index_t z = 0, a = 0, da = 0, d = 0;      // in a tape; without an activation z is a and d is da
  index_t tz = 0, ta = 0, tda = 0, td = 0;  // in a tangent, likewise
  bool low_rank = false;                    // the last step is (resident_low_rank.inl.h)
  index_t inputs = 0, adjoints = 0;         // in a slot: the transposed Gram matrices of that

  bool single() const { return out == 1; }
};

struct Residence {
  Stage stages[kMaxStages];
  int depth = 0;
  index_t params = 0, tape = 0;  // elements of a set of parameters, and of a tape
  // in a slot; the query samples' tape and a tangent only differ where both are needed at once
  index_t lambda = 0, direction = 0, thetas = 0, tapes = 0, query = 0, tangent = 0, slot = 0;
  index_t gram = 0, scratch = 0;  // in a slot, of steps of low rank

  // False: this call goes through its layers one by one.
  bool plan(const ResidentCall<S>& call) {
    if (!read(*call.program)) return false;
    place(call);
    const index_t samples = max_of(call.support, call.query);
    for (int l = 0; l < depth; ++l) {
      if (samples * stages[l].in * stages[l].out > kResidentWork) return false;
    }
    return slot * index_t(sizeof(S)) <= kResidentBytes;
  }

 private:
  bool read(const Program& program) {
    const LossKind loss = program.loss();
    if (loss != LossKind::squared_error && loss != LossKind::cross_entropy &&
        loss != LossKind::gaussian_policy) {
      return false;
    }
    for (const LayerDesc& d : program.layers()) {
      if (d.dense() && d.in.pixels() == 1) {
        if (depth == kMaxStages) return false;
        Stage& s = stages[depth++];
        s.layer = &d;
        s.in = d.in.channels;
        s.out = d.out.channels;
        s.relu = d.relu;
        continue;
      }
      const ActivationOps* ops = activation_ops(d.kind);
      if (!ops || depth == 0) return false;
      Stage& s = stages[depth - 1];
      if (s.activation || s.relu) return false;
      s.activation = ops;
      s.alpha = S(d.alpha);
    }
    return depth > 0 && !stages[0].single();
  }

  void place(const ResidentCall<S>& call) {
    const index_t samples = max_of(call.support, call.query);
    const bool adapts = call.steps > 0 && call.loss_weights[call.steps] != 0;
    const LowRank last(call.support, call.query);
    index_t columns = 0;  // of the scratch
    Arena set, pass, along, grams;
    for (int l = 0; l < depth; ++l) {
      Stage& s = stages[l];
      s.in_row = l > 0 ? stages[l - 1].out_row : s.in;
      s.out_row = s.single() && l == depth - 1 ? 1 : padded_row(s.out);
      s.w = set.take(s.single() ? 0 : s.in * s.out_row);
      s.wt = set.take(l > 0 ? s.out * s.in_row : 0);
      s.b = set.take(s.out_row);
      const index_t n = samples * s.out_row;
      s.z = s.a = pass.take(n);
      s.d = s.da = pass.take(n);
      s.tz = s.ta = along.take(n);
      s.td = s.tda = along.take(n);
      s.low_rank = adapts && l > 0 && !s.single() && s.in * s.out >= samples * (s.in + s.out);
      if (s.low_rank) {
        s.inputs = grams.take(last.transposed());
        s.adjoints = grams.take(last.transposed());
        columns = max_of(columns, max_of(s.in, s.out));
      }
      if (!s.activation) continue;
      s.a = pass.take(n);
      s.da = pass.take(n);
      s.ta = along.take(n);
      s.tda = along.take(n);
    }
    params = set.size();
    tape = pass.size();
    Arena all;
    direction = all.take(call.one_rate || call.first_order ? 0 : params);
    thetas = all.take(max_of<index_t>(call.steps, 1) * params);
    // over the last theta, stage by stage as the query's backward is done with it
    lambda = thetas + max_of<index_t>(call.steps - 1, 0) * params;
    tapes = all.take((call.first_order ? 1 : call.steps) * tape);
    query = tangent = all.take(columns > 0 ? tape : max_of(tape, along.size()));
    if (columns > 0) {
      tangent = all.take(along.size());
      gram = all.take(last.gram());
      scratch = all.take(last.scratch(columns));
      const index_t transposed = all.take(grams.size());
      for (int l = 0; l < depth; ++l) {
        stages[l].inputs += transposed;
        stages[l].adjoints += transposed;
      }
    }
    slot = all.size();
  }
};

}  // namespace FM_KERNELS
