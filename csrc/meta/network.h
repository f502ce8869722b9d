// The passes of a whole program, layer by layer, over tasks that pass together.
//
// Memory of one task is planned (TapePlan, TangentPlan, the plans of calls); what T tasks that pass
// together need is T times that, a region of each task's following that of the task before it: a
// region at `offset` of one task's plan is [T, size] at T * offset.
#pragma once

#include "program/backend.h"
#include "program/plan.h"

namespace fm {

// Samples of T tasks as the engine reads them: x [T, N, ...] channels last.
template <class S>
struct Batch {
  const S* x = nullptr;
  const void* y = nullptr;
  index_t samples = 0;  // N
  index_t total = 0;    // samples of a task, of which these may be a chunk
  index_t tasks = 1;    // T, one where there are chunks
};

// Where losses and accuracies of the tasks go, `stride` apart; nowhere where null.
struct Metrics {
  double *value = nullptr, *accuracy = nullptr;
  index_t stride = 1;
};

template <class S>
struct Tape {
  const TapePlan* plan = nullptr;
  S* base = nullptr;
  index_t tasks = 1;
  index_t first = 0;  // sample
  S* y(size_t l) const { return at(plan->y[l], plan->y_size[l]); }
  S* dx(size_t l) const { return at(plan->dx[l], plan->dx_size[l]); }
  S* saved(size_t l) const { return at(plan->saved[l], plan->saved_size[l]); }
  S* dz() const { return at(plan->dz, plan->dz_size); }
  // From sample `first` of `total` on. A tape with less room serves one chunk after the other.
  Tape from(index_t sample, index_t total) const {
    return {plan, base, tasks, plan->samples < total ? 0 : first + sample};
  }

 private:
  S* at(index_t offset, index_t size) const { return base + tasks * offset + first * size; }
};

// Parameters of every task, or a direction: rows [P], and what is not in them of factored layers.
template <class S>
struct Params {
  const S* data = nullptr;
  index_t stride = 0;
  const Factors<S>* factors = nullptr;  // [layers], null where none is factored
  Params() = default;
  Params(const S* data, index_t stride, const Factors<S>* factors = nullptr)
      : data(data), stride(stride), factors(factors) {}
  Params(const Rows<const S>& rows) : data(rows.data), stride(rows.stride) {}
};

// Where a factored layer's part of an adjoint, (x, dy), or of a product, (x, tdy) and (tx, dy),
// goes. A null `a` has x already.
template <class S>
struct FactorRows {
  Rows<S> a, b, ta, tb;
  Rows<const S> base;  // what b is on top of, or null
};

// What is done with an adjoint or product g of the parameters: out = base + factor * rate (.) g,
// with one rate per segment. A null base is zero; it may be `out` itself. Factors are scaled alike.
template <class S>
struct Update {
  Rows<const S> base;
  S factor = S(1);
  const S* rates = nullptr;                // in backend memory; null: 1
  index_t rate_stride = 1;                 // from segment to segment (0: they share one)
  const FactorRows<S>* factors = nullptr;  // [layers], where layers are factored
  // [segments], on the host: the others are scaled by zero, whatever their rate. Null: all.
  const std::uint8_t* adapted = nullptr;
  bool moves(index_t segment) const { return !adapted || adapted[segment]; }
  S scale(index_t segment) const { return moves(segment) ? factor : factor * S(0); }
  const S* rate(index_t segment) const {
    return rates && moves(segment) ? rates + segment * rate_stride : nullptr;
  }
};

template <class S>
struct Tangent {
  const TangentPlan* plan = nullptr;
  S* base = nullptr;
  index_t tasks = 1;
  S* ty(size_t l) const { return base + tasks * plan->ty[l]; }
  S* tdx(size_t l) const { return base + tasks * plan->tdx[l % 2]; }
  S* tdz() const { return base + tasks * plan->tdz; }
};

// Samples that pass through all layers together. In lockstep that is all: chunks serve a cache that
// one task has for itself.
template <class S>
index_t chunk_of(const Program& program, const Backend<S>& backend, index_t samples) {
  return backend.lockstep ? samples : program.chunk(samples);
}

template <class S>
class Network {
 public:
  using Params = fm::Params<S>;

  // Parameters lie in their rows as `places` says, or else the program.
  Network(const Program& program, const Backend<S>& backend, const Places* places = nullptr)
      : program_(program), backend_(backend), places_(places) {}

  void forward(Params theta, const Batch<S>& batch, const Tape<S>& tape, const Exec& exec) const;
  // Value and accuracy of the loss; with `gradient` the adjoint of the output as well.
  void loss(const Batch<S>& batch, const Tape<S>& tape, bool gradient, const Metrics& metrics,
            const Exec& exec) const;
  // From the adjoint `dz` of the output to dw [P], which may be null; fills the tape's adjoints, or
  // takes turns in those of `room`.
  void backward(Params theta, const Batch<S>& batch, const Tape<S>& tape, const S* dz, Rows<S> dw,
                const Update<S>& update, const Exec& exec, const Tangent<S>* room = nullptr) const;
  void tangent_forward(Params theta, Params tw, const Batch<S>& batch, const Tape<S>& tape,
                       const Tangent<S>& tangent, const Exec& exec,
                       const std::uint8_t* still = nullptr) const;
  // out = Hessian of the loss with respect to the output, times the output's tangent
  void loss_hessian(const Batch<S>& batch, const Tape<S>& tape, const Tangent<S>& tangent, S* out,
                    const Exec& exec) const;
  void tangent_backward(Params theta, Params tw, const Batch<S>& batch, const Tape<S>& tape,
                        const Tangent<S>& tangent, Rows<S> tdw, const Update<S>& update,
                        const Exec& exec, const std::uint8_t* still = nullptr) const;

  // forward, loss and backward, a chunk of samples at a time
  void gradient(Params theta, const Batch<S>& batch, const Tape<S>& tape, Rows<S> dw,
                const Update<S>& update, const Metrics& metrics, const Exec& exec) const;
  // tdw = H tw, from the tape that `gradient` left, a chunk at a time. `tw` is zero on layers that
  // `still` marks ([layers], may be null). Where all samples are one chunk, tdw may be tw.
  void hessian_vector(Params theta, Params tw, const Batch<S>& batch, const Tape<S>& tape,
                      const Tangent<S>& tangent, Rows<S> tdw, const Update<S>& update,
                      const Exec& exec, const std::uint8_t* still = nullptr) const;
  // out = J' H_loss J tw likewise, J being the derivative of the outputs, from the tape that
  // `forward` left.
  void gauss_newton_vector(Params theta, Params tw, const Batch<S>& batch, const Tape<S>& tape,
                           const Tangent<S>& tangent, Rows<S> out, const Update<S>& update,
                           const Exec& exec) const;
  // Samples from `first` on.
  Batch<S> slice(const Batch<S>& batch, index_t first, index_t samples) const;

 private:
  LayerArgs<S> args(size_t l, Params theta, const Batch<S>& batch, const Tape<S>& tape) const;
  // The same with adjoints, and with tangents.
  LayerArgs<S> adjoint_args(size_t l, Params theta, const Batch<S>& batch, const Tape<S>& tape,
                            const S* dz, const Tangent<S>* room) const;
  LayerArgs<S> tangent_args(size_t l, Params theta, Params tw, const Batch<S>& batch,
                            const Tape<S>& tape, const Tangent<S>& tangent,
                            const std::uint8_t* still) const;
  // Whether layer l sweeps the pixels of the norm above it.
  bool in_strips(size_t l) const { return backend_.strips && program_.layers()[l].strip_rows > 0; }
  // Whether layer l maps, in backward passes, the adjoint of the norm above it.
  bool folds(size_t l) const { return backend_.folds && program_.layers()[l].folds_norm; }
  // Whether layer l is a batch norm that does the layer above it, a mean over images.
  bool averages(size_t l) const {
    return backend_.averages && program_.layers()[l].kind == LayerKind::batch_norm &&
           l + 1 < depth() && program_.layers()[l + 1].image_mean();
  }
  // The layer in whose place the adjoint of layer l's input lies: that of a mean which the norm
  // below does, since that norm's own may take turns with the adjoint that it reads.
  size_t adjoint_place(size_t l) const { return l > 1 && averages(l - 2) ? l - 1 : l; }
  // body(args_of(l)), with those of the layer above if layer l works on that too: in strips, where
  // it averages or, with `adjoints`, where it folds. Not called where the layer below does all.
  template <class ArgsOf, class Body>
  void with_above(size_t l, const ArgsOf& args_of, const Body& body, bool adjoints = false) const {
    if (l > 0 && averages(l - 1)) return;
    LayerArgs<S> a = args_of(l);
    if (!in_strips(l) && !averages(l) && !(adjoints && folds(l))) return body(a);
    const LayerArgs<S> above = args_of(l + 1);
    a.above = &above;
    body(a);
  }
  // Runs a pass that leaves layer l's dw at `where` (a field of a) and updates its slice of `out`.
  void update_layer(typename LayerOps<S>::Pass pass, LayerArgs<S>& a, S* LayerArgs<S>::* where,
                    Rows<S> out, const Update<S>& update, const Exec& exec) const;
  // Stores the factors of what `pass` left, where layer l is factored.
  void store_factors(const LayerArgs<S>& a, const Update<S>& update, const Exec& exec) const;
  void store_factor_b(const LayerArgs<S>& a, const S* values, Rows<const S> base,
                      const Update<S>& update, Rows<S> out, const Exec& exec) const;
  LossArgs<S> loss_args(const Batch<S>& batch, const Tape<S>& tape) const;
  const LayerOps<S>& ops(const LayerArgs<S>& a) const {
    return a.w_factors ? backend_.factored.layer : backend_.layers[int(a.desc->kind)];
  }
  index_t place(const LayerDesc& d) const {
    return places_ ? places_->layer[&d - program_.layers().data()] : d.param_offset;
  }
  size_t depth() const { return program_.layers().size(); }
  size_t first() const { return size_t(program_.first_trainable()); }
  // The lowest layer whose backward pass a Hessian product needs. It asks for no adjoint of the
  // first layer's output if that is bilinear, since nothing moves its input; the second's pass
  // leaves nothing else if it is bilinear as well.
  size_t lowest_adjoint() const {
    const auto bilinear = [&](size_t l) {
      return l < depth() && program_.layers()[l].kind == LayerKind::bilinear;
    };
    return first() + (bilinear(first()) && bilinear(first() + 1) ? 2 : 0);
  }

  const Program& program_;
  const Backend<S>& backend_;
  const Places* places_;
};

}  // namespace fm
