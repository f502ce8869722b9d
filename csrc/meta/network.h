// The passes of a whole program over one task, layer by layer.
#pragma once

#include "program/backend.h"
#include "program/plan.h"

namespace fm {

// Samples of one task as the engine reads them: x channels last.
template <class S>
struct Batch {
  const S* x = nullptr;
  const void* y = nullptr;
  index_t samples = 0;
  index_t total = 0;  // samples of the task, of which these may be a chunk
};

template <class S>
struct Tape {
  const TapePlan* plan = nullptr;
  S* base = nullptr;
  index_t first = 0;  // sample
  S* y(size_t l) const { return base + plan->y[l] + first * plan->y_size[l]; }
  S* dx(size_t l) const { return base + plan->dx[l] + first * plan->dx_size[l]; }
  S* saved(size_t l) const { return base + plan->saved[l] + first * plan->saved_size[l]; }
  S* dz() const { return base + plan->dz + first * plan->dz_size; }
  // From sample `first` of `total` on. A tape with less room serves one chunk after the other.
  Tape from(index_t sample, index_t total) const {
    return {plan, base, plan->samples < total ? 0 : sample};
  }
};

// What is done with an adjoint or product g of the parameters: out = base + factor * rate (.) g,
// with one rate per segment. A null base is zero; it may be `out` itself.
template <class S>
struct Update {
  const S* base = nullptr;
  S factor = S(1);
  const S* rates = nullptr;  // [segments], null: 1
};

template <class S>
struct Tangent {
  const TangentPlan* plan = nullptr;
  S* base = nullptr;
  S* ty(size_t l) const { return base + plan->ty[l]; }
  S* tdx(size_t l) const { return base + plan->tdx[l % 2]; }
  S* tdz() const { return base + plan->tdz; }
};

template <class S>
class Network {
 public:
  Network(const Program& program, const Backend<S>& backend)
      : program_(program), backend_(backend) {}

  void forward(const S* theta, const Batch<S>& batch, const Tape<S>& tape, const Exec& exec) const;
  // Value and accuracy of the loss; with `gradient` the adjoint of the output as well.
  void loss(const Batch<S>& batch, const Tape<S>& tape, bool gradient, double* value,
            double* accuracy, const Exec& exec) const;
  // From the adjoint `dz` of the output to dw [P], which may be null; fills the tape's adjoints.
  void backward(const S* theta, const Batch<S>& batch, const Tape<S>& tape, const S* dz, S* dw,
                const Update<S>& update, const Exec& exec) const;
  void tangent_forward(const S* theta, const S* tw, const Batch<S>& batch, const Tape<S>& tape,
                       const Tangent<S>& tangent, const Exec& exec,
                       const std::uint8_t* still = nullptr) const;
  // out = Hessian of the loss with respect to the output, times the output's tangent
  void loss_hessian(const Batch<S>& batch, const Tape<S>& tape, const Tangent<S>& tangent, S* out,
                    const Exec& exec) const;
  void tangent_backward(const S* theta, const S* tw, const Batch<S>& batch, const Tape<S>& tape,
                        const Tangent<S>& tangent, S* tdw, const Update<S>& update,
                        const Exec& exec, const std::uint8_t* still = nullptr) const;

  // forward, loss and backward, a chunk of samples at a time
  double gradient(const S* theta, const Batch<S>& batch, const Tape<S>& tape, S* dw,
                  const Update<S>& update, double* accuracy, const Exec& exec) const;
  // tdw = H tw, from the tape that `gradient` left, a chunk at a time. `tw` is zero on layers that
  // `still` marks ([layers], may be null). Where all samples are one chunk, tdw may be tw.
  void hessian_vector(const S* theta, const S* tw, const Batch<S>& batch, const Tape<S>& tape,
                      const Tangent<S>& tangent, S* tdw, const Update<S>& update, const Exec& exec,
                      const std::uint8_t* still = nullptr) const;

 private:
  LayerArgs<S> args(size_t l, const S* theta, const Batch<S>& batch, const Tape<S>& tape) const;
  Batch<S> slice(const Batch<S>& batch, index_t first, index_t samples) const;
  // Runs a pass that leaves layer l's dw at `where` (a field of a) and updates its slice of `out`.
  void update_layer(typename LayerOps<S>::Pass pass, LayerArgs<S>& a, S* LayerArgs<S>::* where,
                    S* out, const Update<S>& update, const Exec& exec) const;
  LossArgs<S> loss_args(const Batch<S>& batch, const Tape<S>& tape) const;
  const LayerOps<S>& ops(size_t l) const { return backend_.layers[int(program_.layers()[l].kind)]; }
  size_t depth() const { return program_.layers().size(); }
  size_t first() const { return size_t(program_.first_trainable()); }

  const Program& program_;
  const Backend<S>& backend_;
};

}  // namespace fm
