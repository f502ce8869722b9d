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
  a.scale = S(program_.loss_scale(batch.total));
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
void Network<S>::update_layer(typename LayerOps<S>::Pass pass, LayerArgs<S>& a,
                              S* LayerArgs<S>::* where, S* out, const Update<S>& update,
                              const Exec& exec) const {
  const LayerDesc& d = *a.desc;
  if (!out || d.param_count == 0) return pass(a, exec);
  const index_t weights = d.has_weight ? 1 : 0;
  const auto scale = [&](index_t segment) {
    return update.rates ? update.factor * update.rates[segment] : update.factor;
  };
  const S weight_scale = weights ? scale(d.segment) : S(1);
  const S bias_scale = d.has_bias ? scale(d.segment + weights) : S(1);
  const S* base = update.base ? update.base + d.param_offset : nullptr;
  out += d.param_offset;
  if (d.dense() || (!base && weight_scale == S(1) && bias_scale == S(1))) {
    a.*where = out;
    a.dw_base = base;
    a.weight_scale = weight_scale;
    a.bias_scale = bias_scale;
    return pass(a, exec);
  }
  S* g = static_cast<S*>(exec.scratch) + scratch_before_update(d, a.samples);
  a.*where = g;
  pass(a, exec);
  const index_t split = d.has_bias ? d.bias_offset : d.param_count;
  const auto finish = [&](index_t begin, index_t end, S s) {
    backend_.vector.update(end - begin, base ? base + begin : nullptr, s, g + begin, out + begin);
  };
  if (d.has_weight) finish(0, split, weight_scale);
  if (d.has_bias) finish(split, d.param_count, bias_scale);
}

template <class S>
void Network<S>::backward(const S* theta, const Batch<S>& batch, const Tape<S>& tape, const S* dz,
                          S* dw, const Update<S>& update, const Exec& exec) const {
  const S* dy = dz;
  for (size_t l = depth(); l-- > first();) {
    LayerArgs<S> a = args(l, theta, batch, tape);
    a.dy = dy;
    a.dx = l > first() ? tape.dx(l) : nullptr;
    update_layer(ops(l).backward, a, &LayerArgs<S>::dw, dw, update, exec);
    dy = a.dx;
  }
}

template <class S>
void Network<S>::tangent_forward(const S* theta, const S* tw, const Batch<S>& batch,
                                 const Tape<S>& tape, const Tangent<S>& tangent, const Exec& exec,
                                 const std::uint8_t* still) const {
  for (size_t l = first(); l < depth(); ++l) {
    LayerArgs<S> a = args(l, theta, batch, tape);
    a.tw = still && still[l] ? nullptr : tw + a.desc->param_offset;
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
                                  const Update<S>& update, const Exec& exec,
                                  const std::uint8_t* still) const {
  const S* tdy = tangent.tdz();
  for (size_t l = depth(); l-- > first();) {
    LayerArgs<S> a = args(l, theta, batch, tape);
    a.dy = l + 1 < depth() ? tape.dx(l + 1) : tape.dz();
    a.tw = still && still[l] ? nullptr : tw + a.desc->param_offset;
    a.tx = l > first() ? tangent.ty(l - 1) : nullptr;
    a.tdy = tdy;
    a.tdx = l > first() ? tangent.tdx(l) : nullptr;
    update_layer(ops(l).tangent_backward, a, &LayerArgs<S>::tdw, tdw, update, exec);
    tdy = a.tdx;
  }
}

template <class S>
Batch<S> Network<S>::slice(const Batch<S>& batch, index_t first, index_t samples) const {
  const index_t element =
      program_.loss() == LossKind::cross_entropy ? sizeof(std::int64_t) : sizeof(S);
  Batch<S> part = batch;
  part.samples = samples;
  part.x = batch.x + first * program_.input().size();
  part.y = static_cast<const char*>(batch.y) + first * program_.target_size() * element;
  return part;
}

template <class S>
double Network<S>::gradient(const S* theta, const Batch<S>& batch, const Tape<S>& tape, S* dw,
                            const Update<S>& update, double* accuracy, const Exec& exec) const {
  const index_t step = program_.chunk(batch.samples);
  double total = 0, hits = 0;
  Update<S> next = update;
  for (index_t at = 0; at < batch.samples; at += step) {
    const Batch<S> part = slice(batch, at, min_of(step, batch.samples - at));
    const Tape<S> here = tape.from(at, batch.samples);
    double value = 0, share = 0;
    forward(theta, part, here, exec);
    loss(part, here, true, &value, &share, exec);
    backward(theta, part, here, here.dz(), dw, next, exec);
    next.base = dw;
    total += value;
    hits += share * double(part.samples);
  }
  *accuracy = hits / double(batch.samples);
  return total;
}

template <class S>
void Network<S>::hessian_vector(const S* theta, const S* tw, const Batch<S>& batch,
                                const Tape<S>& tape, const Tangent<S>& tangent, S* tdw,
                                const Update<S>& update, const Exec& exec,
                                const std::uint8_t* still) const {
  const index_t step = program_.chunk(batch.samples);
  Update<S> next = update;
  for (index_t at = 0; at < batch.samples; at += step) {
    const Batch<S> part = slice(batch, at, min_of(step, batch.samples - at));
    const Tape<S> here = tape.from(at, batch.samples);
    tangent_forward(theta, tw, part, here, tangent, exec, still);
    loss_hessian(part, here, tangent, tangent.tdz(), exec);
    tangent_backward(theta, tw, part, here, tangent, tdw, next, exec, still);
    next.base = tdw;
  }
}

template class Network<float>;
template class Network<double>;

}  // namespace fm
