// The meta-gradient of one learner on tasks of one shape: everything that stays the same from call
// to call is kept here, so that a call passes the addresses of the samples and of its results.
#include <optional>

#include "bind/arguments.h"
#include "bind/module.h"
#include "cpu/backend_cpu.h"

namespace fm::bind {
namespace {

template <class S>
class Prepared {
 public:
  Prepared(const Program& program, index_t tasks, index_t steps, bool first_order, int memory,
           const std::vector<double>& loss_weights, index_t support, index_t query, int rate_layout,
           index_t rate_rows, const std::vector<std::uint8_t>& adapted) {
    require(index_t(loss_weights.size()) == steps + 1, "loss_weights: expected ", steps + 1,
            " weights, one after each of 0 to ", steps, " steps, got ", loss_weights.size());
    call_.program = &program;
    call_.tasks = tasks;
    call_.steps = steps;
    call_.first_order = first_order;
    call_.memory = Memory(memory);
    call_.loss_weights = loss_weights;
    call_.rates = rates<S>(program, {0, rate_layout, rate_rows, adapted});
    call_.support.count = support;
    call_.query.count = query;
  }

  void set_parameters(const Addresses& addresses) {
    call_.params = tensors<const S>(*call_.program, addresses, false);
  }

  void set_rates(Address values) { call_.rates.values = at<const S>(values); }

  // `rate_gradient` is 0 where none is wanted.
  void set_gradients(const Addresses& addresses, Address rate_gradient) {
    call_.gradients = tensors<S>(*call_.program, addresses, false);
    planned_ = planned_ && bool(call_.rate_gradient) == bool(rate_gradient);
    call_.rate_gradient = at<S>(rate_gradient);
  }

  // Loss and accuracy after the last step, means over tasks; nothing if the workspace is too
  // small. `metrics` takes losses and accuracies [2, T, K + 1], `loss` the loss.
  std::optional<std::pair<double, double>> run(Address support_x, Address support_y,
                                               bool support_last, Address query_x, Address query_y,
                                               bool query_last, Address metrics, Address loss,
                                               Address workspace, index_t bytes) {
    const index_t row = call_.steps + 1, rows = call_.tasks;
    double* values = at<double>(metrics);
    require(!call_.params.tensors.empty() && call_.rates.values && !call_.gradients.tensors.empty(),
            "prepared call: parameters, rates and gradients come first");
    py::gil_scoped_release release;
    plan(support_last, query_last);
    if (plan_.bytes > bytes) return std::nullopt;
    call_.support.x = at<const S>(support_x);
    call_.support.y = at<const void>(support_y);
    call_.query.x = at<const S>(query_x);
    call_.query.y = at<const void>(query_y);
    call_.query_loss = values;
    call_.query_accuracy = values + rows * row;
    plan_.loss = meta_gradient(call_, at<void>(workspace));
    *at<S>(loss) = S(plan_.loss);
    double accuracy = 0;
    for (index_t t = 0; t < rows; ++t) accuracy += call_.query_accuracy[t * row + call_.steps];
    return std::make_pair(plan_.loss, accuracy / double(rows));
  }

  CallPlan plan() const { return plan_; }

 private:
  // Plans anew after a change of threads, kernels or memory format.
  void plan(bool support_last, bool query_last) {
    const Backend<S>* backend = &cpu::backend<S>();
    const index_t slots = backend->slots(call_.tasks);
    if (planned_ && backend == call_.backend && slots == call_.slots &&
        support_last == call_.support.channels_last && query_last == call_.query.channels_last) {
      return;
    }
    call_.backend = backend;
    call_.slots = slots;
    call_.support.channels_last = support_last;
    call_.query.channels_last = query_last;
    plan_ = plan_meta_gradient<S>(call_);
    planned_ = true;
  }

  MetaCall<S> call_;
  CallPlan plan_;
  bool planned_ = false;
};

template <class S>
void define(py::module_& m, const char* name) {
  using P = Prepared<S>;
  py::class_<P>(m, name)
      .def(py::init<const Program&, index_t, index_t, bool, int, const std::vector<double>&,
                    index_t, index_t, int, index_t, const std::vector<std::uint8_t>&>(),
           py::keep_alive<1, 2>())
      .def("set_parameters", &P::set_parameters)
      .def("set_rates", &P::set_rates)
      .def("set_gradients", &P::set_gradients)
      .def("run", &P::run)
      .def_property_readonly("plan", [](const P& p) { return p.plan(); });
}

}  // namespace

void define_prepared(py::module_& m) {
  define<float>(m, "PreparedFloat32");
  define<double>(m, "PreparedFloat64");
}

}  // namespace fm::bind
