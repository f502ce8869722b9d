#include "meta/network.h"

namespace fm {

template <class S>
LayerArgs<S> Network<S>::args(size_t l, const S* theta, const Batch<S>& batch,
                              const Tape<S>& tape) const {
  LayerArgs<S> a;
  a.desc = &program_.layers()[l];
  a.samples = batch.samples;
  a.x = l == 0 ? batch.x : tape.y(l - 1);
  a.w = theta + a.desc->param_offset;
  a.y = tape.y(l);
  a.saved = tape.saved(l);
  return a;
}

template <class S>
LossArgs<S> Network<S>::loss_args(const Batch<S>& batch, const Tape<S>& tape) const {
  LossArgs<S> a;
  a.samples = batch.samples;
  a.outputs = program_.output().size();
  a.scale = S(program_.loss_scale(batch.samples));
  a.z = tape.y(depth() - 1);
  a.target = batch.y;
  return a;
}

template <class S>
void Network<S>::forward(const S* theta, const Batch<S>& batch, const Tape<S>& tape,
                         const Exec& exec) const {
  for (size_t l = 0; l < depth(); ++l) ops(l).forward(args(l, theta, batch, tape), exec);
}

template <class S>
void Network<S>::loss(const Batch<S>& batch, const Tape<S>& tape, bool gradient, double* value,
                      double* accuracy, const Exec& exec) const {
  LossArgs<S> a = loss_args(batch, tape);
  a.dz = gradient ? tape.dz() : nullptr;
  a.value = value;
  a.accuracy = accuracy;
  backend_.losses[int(program_.loss())].value(a, exec);
}

template <class S>
void Network<S>::backward(const S* theta, const Batch<S>& batch, const Tape<S>& tape, const S* dz,
                          S* dw, const Exec& exec) const {
  const S* dy = dz;
  for (size_t l = depth(); l-- > first();) {
    LayerArgs<S> a = args(l, theta, batch, tape);
    a.dy = dy;
    a.dx = l > first() ? tape.dx(l) : nullptr;
    a.dw = dw ? dw + a.desc->param_offset : nullptr;
    ops(l).backward(a, exec);
    dy = a.dx;
  }
}

template <class S>
void Network<S>::tangent_forward(const S* theta, const S* tw, const Batch<S>& batch,
                                 const Tape<S>& tape, const Tangent<S>& tangent,
                                 const Exec& exec) const {
  for (size_t l = first(); l < depth(); ++l) {
    LayerArgs<S> a = args(l, theta, batch, tape);
    a.tw = tw + a.desc->param_offset;
    a.tx = l > first() ? tangent.ty(l - 1) : nullptr;
    a.ty = tangent.ty(l);
    ops(l).tangent_forward(a, exec);
  }
}

template <class S>
void Network<S>::loss_hessian(const Batch<S>& batch, const Tape<S>& tape, const Tangent<S>& tangent,
                              S* out, const Exec& exec) const {
  LossArgs<S> a = loss_args(batch, tape);
  a.tz = tangent.ty(depth() - 1);
  a.tdz = out;
  backend_.losses[int(program_.loss())].hessian(a, exec);
}

template <class S>
void Network<S>::tangent_backward(const S* theta, const S* tw, const Batch<S>& batch,
                                  const Tape<S>& tape, const Tangent<S>& tangent, S* tdw,
                                  const Exec& exec) const {
  const S* tdy = tangent.tdz();
  for (size_t l = depth(); l-- > first();) {
    LayerArgs<S> a = args(l, theta, batch, tape);
    a.dy = l + 1 < depth() ? tape.dx(l + 1) : tape.dz();
    a.tw = tw + a.desc->param_offset;
    a.tx = l > first() ? tangent.ty(l - 1) : nullptr;
    a.tdy = tdy;
    a.tdx = l > first() ? tangent.tdx(l) : nullptr;
    a.tdw = tdw + a.desc->param_offset;
    ops(l).tangent_backward(a, exec);
    tdy = a.tdx;
  }
}

template <class S>
double Network<S>::gradient(const S* theta, const Batch<S>& batch, const Tape<S>& tape, S* dw,
                            double* accuracy, const Exec& exec) const {
  double value = 0;
  forward(theta, batch, tape, exec);
  loss(batch, tape, true, &value, accuracy, exec);
  backward(theta, batch, tape, tape.dz(), dw, exec);
  return value;
}

template <class S>
void Network<S>::hessian_vector(const S* theta, const S* tw, const Batch<S>& batch,
                                const Tape<S>& tape, const Tangent<S>& tangent, S* tdw,
                                const Exec& exec) const {
  tangent_forward(theta, tw, batch, tape, tangent, exec);
  loss_hessian(batch, tape, tangent, tangent.tdz(), exec);
  tangent_backward(theta, tw, batch, tape, tangent, tdw, exec);
}

template class Network<float>;
template class Network<double>;

}  // namespace fm
