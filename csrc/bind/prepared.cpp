// The meta-gradient of one learner on tasks of one shape: everything that stays the same from call
// to call is kept here, so that a call passes the addresses of the samples and of its results.
#include <array>

#include "bind/arguments.h"
#include "bind/backends.h"
#include "bind/module.h"

namespace fm::bind {
namespace {

template <class S>
class Prepared {
 public:
  Prepared(const PlaceTuple& where, const Program& program, index_t tasks, index_t steps,
           bool first_order, int memory, const std::vector<double>& loss_weights, index_t support,
           index_t query, int rate_layout, index_t rate_rows,
           const std::vector<std::uint8_t>& adapted) {
    require(index_t(loss_weights.size()) == steps + 1, "loss_weights: expected ", steps + 1,
            " weights, one after each of 0 to ", steps, " steps, got ", loss_weights.size());
    place(call_, where);
    kind_ = BackendKind(std::get<0>(where));
    call_.program = &program;
    call_.tasks = tasks;
    call_.steps = steps;
    call_.first_order = first_order;
    call_.memory = Memory(memory);
    call_.loss_weights = loss_weights;
    call_.rates = rates<S>(program, {0, rate_layout, rate_rows, adapted});
    call_.rates.adapted_there = at<const std::uint8_t>(std::get<4>(where));
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

  // Loss and accuracy after the last step, means over tasks, and a bytearray of losses and
  // accuracies, double [2, T, K + 1]; None if the workspace is too small. `places` are those of
  // x and y of the support, x and y of the query, and where the loss goes.
  py::object run(const std::array<Address, 5>& places, bool support_last, bool query_last,
                 Address workspace, index_t bytes) {
    const index_t row = call_.steps + 1, rows = call_.tasks;
    py::object metrics = py::reinterpret_steal<py::object>(
        PyByteArray_FromStringAndSize(nullptr, Py_ssize_t(2 * rows * row * sizeof(double))));
    if (!metrics) throw py::error_already_set();
    double* values = reinterpret_cast<double*>(PyByteArray_AS_STRING(metrics.ptr()));
    check();
    double accuracy = 0;
    bool enough = false;
    {
      py::gil_scoped_release release;
      plan(support_last, query_last);
      enough = plan_.bytes <= bytes;
      if (enough) {
        start({places[0], places[1], places[2], places[3]}, values, workspace);
        *at<S>(places[4]) = S(plan_.loss);
        for (index_t t = 0; t < rows; ++t) accuracy += call_.query_accuracy[t * row + call_.steps];
      }
    }
    if (!enough) return py::none();
    return py::make_tuple(plan_.loss, accuracy / double(rows), std::move(metrics));
  }

  // For memory that is not the host's: as `run`, but the metrics, double [2, T, K + 1] and NaN
  // where a weight is zero, are at an address there, nothing is read and nobody waits. False if the
  // workspace is too small.
  bool launch(const std::array<Address, 4>& places, bool support_last, bool query_last,
              Address workspace, index_t bytes, Address stream, Address metrics) {
    check();
    py::gil_scoped_release release;
    plan(support_last, query_last);
    if (plan_.bytes > bytes) return false;
    call_.exec.context = at<const void>(stream);
    start(places, at<double>(metrics), workspace);
    return true;
  }

  CallPlan plan() const { return plan_; }

 private:
  void check() const {
    require(!call_.params.tensors.empty() && call_.rates.values && !call_.gradients.tensors.empty(),
            "prepared call: parameters, rates and gradients come first");
  }

  void start(const std::array<Address, 4>& places, double* metrics, Address workspace) {
    call_.support.x = at<const S>(places[0]);
    call_.support.y = at<const void>(places[1]);
    call_.query.x = at<const S>(places[2]);
    call_.query.y = at<const void>(places[3]);
    call_.query_loss = metrics;
    call_.query_accuracy = metrics + call_.tasks * (call_.steps + 1);
    plan_.loss = meta_gradient(call_, at<void>(workspace));
  }

  // Plans anew after a change of threads, kernels or memory format.
  void plan(bool support_last, bool query_last) {
    const Backend<S>* backend = &bind::backend<S>(kind_);
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
  BackendKind kind_ = BackendKind::cpu;
  bool planned_ = false;
};

template <class S>
void define(py::module_& m, const char* name) {
  using P = Prepared<S>;
  py::class_<P>(m, name)
      .def(py::init<const PlaceTuple&, const Program&, index_t, index_t, bool, int,
                    const std::vector<double>&, index_t, index_t, int, index_t,
                    const std::vector<std::uint8_t>&>(),
           py::keep_alive<1, 3>())
      .def("set_parameters", &P::set_parameters)
      .def("set_rates", &P::set_rates)
      .def("set_gradients", &P::set_gradients)
      .def("run", &P::run)
      .def("launch", &P::launch)
      .def_property_readonly("plan", [](const P& p) { return p.plan(); });
}

}  // namespace

void define_prepared(py::module_& m) {
  define<float>(m, "PreparedFloat32");
  define<double>(m, "PreparedFloat64");
}

}  // namespace fm::bind
