// One pass or product per task: outputs, loss and gradient, Hessian and Gauss-Newton products.
//
//   Hessian        H v  = tangent_forward, loss Hessian, tangent_backward
//   Gauss-Newton   G v  = J' H_loss J v = tangent_forward, loss Hessian, backward
//
// A chunk of samples goes through all of it before the next, so that what its passes leave for each
// other stays in the cache; the chunks' sums are added up in order. Where a call brings memory for
// the tapes of all samples, forward and loss are left out once they are there.

#include "meta/layout.h"

namespace fm {
namespace {

struct ProductPlan {
  TapePlan tape;
  TangentPlan tangent;
  index_t theta = 0, vector = 0, result = 0, x = 0, tape_at = 0, tangent_at = 0, scratch = 0,
          slot = 0;
  index_t slots = 0;
};

template <class S>
ProductPlan make_plan(const ProductCall<S>& call) {
  const Program& program = *call.program;
  const index_t P = program.param_count();
  const bool products = call.product == Product::hessian || call.product == Product::gauss_newton;
  const index_t chunk = chunk_of(program, *call.backend, call.samples.count);
  ProductPlan plan;
  plan.slots = call.slots;
  plan.tape = plan_tape(program, call.kept ? call.samples.count : chunk, !products);
  plan.tangent = plan_tangent(program, chunk);
  Arena slot;
  plan.theta = slot.take(P);
  plan.vector = slot.take(products ? P : 0);
  plan.result = slot.take(P);
  plan.x = slot.take(staging_size(program, call.samples));
  plan.tape_at = slot.take(call.kept ? 0 : plan.tape.size);
  plan.tangent_at = slot.take(products ? plan.tangent.size : 0);
  plan.scratch = slot.take(plan_scratch(program, chunk));
  plan.slot = slot.size();
  return plan;
}

template <class S>
class Products {
 public:
  Products(const ProductCall<S>& call, const ProductPlan& plan, S* workspace)
      : call_(call),
        plan_(plan),
        program_(*call.program),
        backend_(*call.backend),
        network_(program_, backend_),
        slots_(workspace) {}

  void run() {
    backend_.for_each_task(
        call_.tasks, plan_.slots, call_.exec,
        [](void* self, index_t slot, index_t first, index_t count, const Exec& exec) {
          static_cast<const Products*>(self)->work(slot, first, count, exec);
        },
        this);
  }

 private:
  using Params = fm::Params<S>;

  void work(index_t slot, index_t first, index_t count, Exec exec) const {
    const index_t P = program_.param_count();
    S* base = slots_ + slot * call_.together() * plan_.slot;
    const auto at = [&](index_t offset) { return base + count * offset; };
    exec.scratch = at(plan_.scratch);
    load_parameters(call_, call_.params, first, count, {at(plan_.theta), P}, exec);
    const Params theta{at(plan_.theta), P};
    const Batch<S> batch = load_samples(call_, call_.samples, first, count, at(plan_.x), exec);
    const Tape<S> tape{
        &plan_.tape, call_.kept ? call_.kept + first * plan_.tape.size : at(plan_.tape_at), count};
    if (call_.product == Product::forward) return forward(theta, batch, tape, first, exec);
    const Rows<S> result{at(plan_.result), P};
    if (call_.product == Product::gradient) {
      network_.gradient(theta, batch, tape, result, {},
                        {call_.loss + first, call_.accuracy + first}, exec);
    } else {
      load_parameters(call_, call_.vector, first, count, {at(plan_.vector), P}, exec);
      curvature(theta, {at(plan_.vector), P}, batch, tape,
                {&plan_.tangent, at(plan_.tangent_at), count}, result, exec);
    }
    store_parameters(call_, {result.data, P}, call_.result, first, count, exec);
  }

  void curvature(Params theta, Params v, const Batch<S>& batch, const Tape<S>& tape,
                 const Tangent<S>& tangent, Rows<S> result, const Exec& exec) const {
    Update<S> next;
    for_each_chunk(batch, tape, [&](const Batch<S>& part, const Tape<S>& here, index_t) {
      if (call_.product == Product::hessian) {
        if (!call_.filled) network_.gradient(theta, part, here, {}, {}, {}, exec);
        network_.hessian_vector(theta, v, part, here, tangent, result, next, exec);
      } else {
        if (!call_.filled) network_.forward(theta, part, here, exec);
        network_.gauss_newton_vector(theta, v, part, here, tangent, result, next, exec);
      }
      next.base = {result.data, result.stride};
    });
  }

  void forward(Params theta, const Batch<S>& batch, const Tape<S>& tape, index_t first,
               const Exec& exec) const {
    const index_t outputs = program_.output().size();
    S* output = call_.output + first * batch.samples * outputs;
    for_each_chunk(batch, tape, [&](const Batch<S>& part, const Tape<S>& here, index_t at) {
      const index_t size = part.samples * outputs;
      network_.forward(theta, part, here, exec);
      backend_.vector.copy(batch.tasks, size, {here.y(program_.layers().size() - 1), size},
                           {output + at * outputs, size}, exec);
    });
  }

  // body(samples from `at` on, their tape, at)
  template <class Body>
  void for_each_chunk(const Batch<S>& batch, const Tape<S>& tape, Body&& body) const {
    const index_t step = chunk_of(program_, backend_, batch.samples);
    for (index_t at = 0; at < batch.samples; at += step) {
      body(network_.slice(batch, at, min_of(step, batch.samples - at)),
           tape.from(at, batch.samples), at);
    }
  }

  const ProductCall<S>& call_;
  const ProductPlan& plan_;
  const Program& program_;
  const Backend<S>& backend_;
  Network<S> network_;
  S* slots_;
};

}  // namespace

index_t kept_tape_size(const Program& program, index_t samples) {
  return plan_tape(program, samples, false).size;
}

template <class S>
CallPlan plan_product(const ProductCall<S>& call) {
  const ProductPlan plan = make_plan(call);
  return told_sizes<S>(call, plan.slots, plan.slot, 0, plan.tape.size);
}

template <class S>
void product(const ProductCall<S>& call, void* workspace) {
  check_labels(call, call.samples, "y");
  const ProductPlan plan = make_plan(call);
  Products<S>(call, plan, static_cast<S*>(workspace)).run();
}

template CallPlan plan_product(const ProductCall<float>&);
template CallPlan plan_product(const ProductCall<double>&);
template void product(const ProductCall<float>&, void*);
template void product(const ProductCall<double>&, void*);

}  // namespace fm
