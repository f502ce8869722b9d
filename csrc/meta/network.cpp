#include "meta/network.h"

namespace fm {

template <class S>
LayerArgs<S> Network<S>::args(size_t l, Params theta, const Batch<S>& batch,
                              const Tape<S>& tape) const {
  LayerArgs<S> a;
  a.desc = &program_.layers()[l];
  a.tasks = batch.tasks;
  a.samples = batch.samples;
  a.x = l == 0 ? batch.x : tape.y(l - 1);
  a.w = theta.data + place(*a.desc);
  a.w_stride = theta.stride;
  if (theta.factors && theta.factors[l].weights) a.w_factors = &theta.factors[l];
  a.y = tape.y(l);
  a.saved = tape.saved(l);
  if (l > 0) a.saved_below = tape.saved(l - 1);
  a.swept_below = l > 0 && in_strips(l - 1);
  return a;
}

template <class S>
LayerArgs<S> Network<S>::adjoint_args(size_t l, Params theta, const Batch<S>& batch,
                                      const Tape<S>& tape, const S* dz,
                                      const Tangent<S>* room) const {
  const auto adjoint = [&](size_t m) {
    return room ? room->tdx(adjoint_place(m)) : tape.dx(adjoint_place(m));
  };
  LayerArgs<S> a = args(l, theta, batch, tape);
  a.dy = l + 1 < depth() ? adjoint(l + 1) : dz;
  a.dx = l > first() && !a.swept_below && !folds(l - 1) ? adjoint(l) : nullptr;
  return a;
}

template <class S>
LayerArgs<S> Network<S>::tangent_args(size_t l, Params theta, Params tw, const Batch<S>& batch,
                                      const Tape<S>& tape, const Tangent<S>& tangent,
                                      const std::uint8_t* still) const {
  LayerArgs<S> a = args(l, theta, batch, tape);
  a.dy = l + 1 < depth() ? tape.dx(adjoint_place(l + 1)) : tape.dz();
  if (!still || !still[l]) {
    a.tw = tw.data + place(*a.desc);
    if (a.w_factors) a.tw_factors = &tw.factors[l];
  }
  a.tw_stride = tw.stride;
  a.tx = l > first() ? tangent.ty(l - 1) : nullptr;
  a.ty = tangent.ty(l);
  a.tdy = l + 1 < depth() ? tangent.tdx(adjoint_place(l + 1)) : tangent.tdz();
  a.tdx = l > first() && !a.swept_below ? tangent.tdx(adjoint_place(l)) : nullptr;
  return a;
}

template <class S>
LossArgs<S> Network<S>::loss_args(const Batch<S>& batch, const Tape<S>& tape) const {
  LossArgs<S> a;
  a.tasks = batch.tasks;
  a.samples = batch.samples;
  a.outputs = program_.output().size();
  a.scale = S(program_.loss_scale(batch.total));
  a.z = tape.y(depth() - 1);
  a.target = batch.y;
  return a;
}

template <class S>
void Network<S>::forward(Params theta, const Batch<S>& batch, const Tape<S>& tape,
                         const Exec& exec) const {
  const auto args_of = [&](size_t l) { return args(l, theta, batch, tape); };
  for (size_t l = 0; l < depth(); ++l) {
    with_above(l, args_of, [&](LayerArgs<S>& a) { ops(a).forward(a, exec); });
  }
}

template <class S>
void Network<S>::loss(const Batch<S>& batch, const Tape<S>& tape, bool gradient,
                      const Metrics& metrics, const Exec& exec) const {
  LossArgs<S> a = loss_args(batch, tape);
  a.dz = gradient ? tape.dz() : nullptr;
  a.value = metrics.value;
  a.accuracy = metrics.accuracy;
  a.value_stride = metrics.stride;
  backend_.losses[int(program_.loss())].value(a, exec);
}

template <class S>
void Network<S>::update_layer(typename LayerOps<S>::Pass pass, LayerArgs<S>& a,
                              S* LayerArgs<S>::* where, Rows<S> out, const Update<S>& update,
                              const Exec& exec) const {
  const LayerDesc& d = *a.desc;
  if (!out.data || d.param_count == 0) return pass(a, exec);
  const Rows<const S> base{update.base.data ? update.base.data + place(d) : nullptr,
                           update.base.stride};
  const index_t bias = d.segment + d.segments() - 1;
  const S* weight_rate = d.has_weight ? update.rate(d.segment) : nullptr;
  const S* bias_rate = d.has_bias ? update.rate(bias) : nullptr;
  out.data += place(d);
  if (d.dense() || backend_.updates || (!base.data && update.factor == S(1) && !update.rates)) {
    a.*where = out.data;
    a.dw_stride = out.stride;
    a.dw_base = base.data;
    a.dw_base_stride = base.stride;
    a.weight_scale = update.scale(d.segment);
    a.bias_scale = update.scale(bias);
    a.weight_rate = weight_rate;
    a.bias_rate = bias_rate;
    pass(a, exec);
    return a.w_factors ? store_factors(a, update, exec) : void();
  }
  S* g = static_cast<S*>(exec.scratch) + a.tasks * scratch_before_update(d, a.samples);
  a.*where = g;
  a.dw_stride = d.param_count;
  pass(a, exec);
  const index_t split = d.has_bias ? d.bias_offset : d.param_count;
  const auto finish = [&](index_t begin, index_t end, index_t segment, const S* rate) {
    const Rows<const S> from{base.data ? base.data + begin : nullptr, base.stride};
    backend_.vector.update(a.tasks, end - begin, from, update.scale(segment), rate,
                           {g + begin, d.param_count}, {out.data + begin, out.stride}, exec);
  };
  if (d.has_weight) finish(0, split, d.segment, weight_rate);
  if (d.has_bias) finish(split, d.param_count, bias, bias_rate);
}

template <class S>
void Network<S>::store_factors(const LayerArgs<S>& a, const Update<S>& update,
                               const Exec& exec) const {
  const auto& vector = backend_.vector;
  const FactorRows<S>& to = update.factors[a.desc - program_.layers().data()];
  const index_t in = a.samples * a.desc->in.size();
  if (to.a.data) vector.copy(a.tasks, in, {a.x, in}, to.a, exec);
  if (to.b.data) store_factor_b(a, a.tdw ? a.tdy : a.dy, to.base, update, to.b, exec);
  if (!to.ta.data) return;
  vector.copy(a.tasks, in, {a.tx, in}, to.ta, exec);
  store_factor_b(a, a.dy, {}, update, to.tb, exec);
}

// out = base + factor * rate * values
template <class S>
void Network<S>::store_factor_b(const LayerArgs<S>& a, const S* values, Rows<const S> base,
                                const Update<S>& update, Rows<S> out, const Exec& exec) const {
  const index_t n = a.samples * a.desc->out.size();
  const index_t segment = a.desc->segment;
  backend_.vector.update(a.tasks, n, base, update.scale(segment), update.rate(segment), {values, n},
                         out, exec);
}

template <class S>
void Network<S>::backward(Params theta, const Batch<S>& batch, const Tape<S>& tape, const S* dz,
                          Rows<S> dw, const Update<S>& update, const Exec& exec,
                          const Tangent<S>* room) const {
  const auto args_of = [&](size_t l) { return adjoint_args(l, theta, batch, tape, dz, room); };
  for (size_t l = depth(); l-- > (dw.data ? first() : lowest_adjoint());) {
    with_above(
        l, args_of,
        [&](LayerArgs<S>& a) {
          update_layer(ops(a).backward, a, &LayerArgs<S>::dw, dw, update, exec);
        },
        true);
  }
}

template <class S>
void Network<S>::tangent_forward(Params theta, Params tw, const Batch<S>& batch,
                                 const Tape<S>& tape, const Tangent<S>& tangent, const Exec& exec,
                                 const std::uint8_t* still) const {
  const auto args_of = [&](size_t l) {
    return tangent_args(l, theta, tw, batch, tape, tangent, still);
  };
  for (size_t l = first(); l < depth(); ++l) {
    with_above(l, args_of, [&](LayerArgs<S>& a) { ops(a).tangent_forward(a, exec); });
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
void Network<S>::tangent_backward(Params theta, Params tw, const Batch<S>& batch,
                                  const Tape<S>& tape, const Tangent<S>& tangent, Rows<S> tdw,
                                  const Update<S>& update, const Exec& exec,
                                  const std::uint8_t* still) const {
  const auto args_of = [&](size_t l) {
    return tangent_args(l, theta, tw, batch, tape, tangent, still);
  };
  for (size_t l = depth(); l-- > first();) {
    with_above(l, args_of, [&](LayerArgs<S>& a) {
      update_layer(ops(a).tangent_backward, a, &LayerArgs<S>::tdw, tdw, update, exec);
    });
  }
}

template <class S>
Batch<S> Network<S>::slice(const Batch<S>& batch, index_t first, index_t samples) const {
  if (samples == batch.samples) return batch;
  const index_t element =
      program_.loss() == LossKind::cross_entropy ? sizeof(std::int64_t) : sizeof(S);
  Batch<S> part = batch;
  part.samples = samples;
  part.x = batch.x + first * program_.input().size();
  part.y = static_cast<const char*>(batch.y) + first * program_.target_size() * element;
  return part;
}

template <class S>
void Network<S>::gradient(Params theta, const Batch<S>& batch, const Tape<S>& tape, Rows<S> dw,
                          const Update<S>& update, const Metrics& metrics, const Exec& exec) const {
  const index_t step = chunk_of(program_, backend_, batch.samples);
  if (step == batch.samples) {
    forward(theta, batch, tape, exec);
    loss(batch, tape, true, metrics, exec);
    return backward(theta, batch, tape, tape.dz(), dw, update, exec);
  }
  double total = 0, hits = 0;
  Update<S> next = update;
  for (index_t at = 0; at < batch.samples; at += step) {
    const Batch<S> part = slice(batch, at, min_of(step, batch.samples - at));
    const Tape<S> here = tape.from(at, batch.samples);
    double value = 0, share = 0;
    forward(theta, part, here, exec);
    loss(part, here, true, {&value, &share}, exec);
    backward(theta, part, here, here.dz(), dw, next, exec);
    next.base = {dw.data, dw.stride};
    total += value;
    hits += share * double(part.samples);
  }
  if (!metrics.value) return;
  *metrics.value = total;
  *metrics.accuracy = hits / double(batch.samples);
}

template <class S>
void Network<S>::hessian_vector(Params theta, Params tw, const Batch<S>& batch, const Tape<S>& tape,
                                const Tangent<S>& tangent, Rows<S> tdw, const Update<S>& update,
                                const Exec& exec, const std::uint8_t* still) const {
  const index_t step = chunk_of(program_, backend_, batch.samples);
  Update<S> next = update;
  for (index_t at = 0; at < batch.samples; at += step) {
    const Batch<S> part = slice(batch, at, min_of(step, batch.samples - at));
    const Tape<S> here = tape.from(at, batch.samples);
    tangent_forward(theta, tw, part, here, tangent, exec, still);
    loss_hessian(part, here, tangent, tangent.tdz(), exec);
    tangent_backward(theta, tw, part, here, tangent, tdw, next, exec, still);
    next.base = {tdw.data, tdw.stride};
  }
}

template <class S>
void Network<S>::gauss_newton_vector(Params theta, Params tw, const Batch<S>& batch,
                                     const Tape<S>& tape, const Tangent<S>& tangent, Rows<S> out,
                                     const Update<S>& update, const Exec& exec) const {
  const index_t step = chunk_of(program_, backend_, batch.samples);
  Update<S> next = update;
  for (index_t at = 0; at < batch.samples; at += step) {
    const Batch<S> part = slice(batch, at, min_of(step, batch.samples - at));
    const Tape<S> here = tape.from(at, batch.samples);
    tangent_forward(theta, tw, part, here, tangent, exec);
    loss_hessian(part, here, tangent, tangent.tdz(), exec);
    backward(theta, part, here, tangent.tdz(), out, next, exec, &tangent);
    next.base = {out.data, out.stride};
  }
}

template class Network<float>;
template class Network<double>;

}  // namespace fm
