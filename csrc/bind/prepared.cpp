// The meta-gradient of one learner on tasks of one shape: everything that stays the same from call
// to call is kept here, so that a call passes the addresses of the samples and of its results; or,
// where tensors can be read here, the tasks alone.
#include <array>

#include "bind/backends.h"
#include "bind/module.h"
#include "bind/watch.h"

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

  // The watch, if there is one, tells when they are elsewhere.
  void set_parameters(const Addresses& addresses, std::shared_ptr<Watch> watch) {
    call_.params = tensors<const S>(*call_.program, addresses, false);
    watch_ = std::move(watch);
  }

  void set_rates(Address values) { call_.rates.values = at<const S>(values); }

  // `rate_gradient` is 0 where none is wanted. `sums` (from, to, elements) are what is added where
  // when the gradient is there; host memory.
  using Sums = std::vector<std::tuple<Address, Address, index_t>>;
  void set_gradients(const Addresses& addresses, Address rate_gradient, const Sums& sums) {
    call_.gradients = tensors<S>(*call_.program, addresses, false);
    planned_ = planned_ && bool(call_.rate_gradient) == bool(rate_gradient);
    call_.rate_gradient = at<S>(rate_gradient);
    sums_ = sums;
  }

  // Samples, x and y of the support and of the query, of the kind that `again` takes.
  void expect(std::shared_ptr<TensorReader> reader, const std::array<py::object, 4>& samples) {
    samples_.clear();
    reader_ = std::move(reader);
    dlpack::Tensor t;
    for (const py::object& x : samples) {
      if (!reader_->read(x.ptr(), t)) return samples_.clear();
      samples_.emplace_back(t);
    }
  }

  // As `run`, from the tensors themselves; None if the tasks are not as expected or have gaps, or
  // if parameters have moved.
  py::object again(const py::object& tasks, const py::object& loss, Address workspace,
                   index_t bytes) {
    // never freed: there may be no interpreter left by then
    static PyObject* const names[] = {
        PyUnicode_InternFromString("support_x"), PyUnicode_InternFromString("support_y"),
        PyUnicode_InternFromString("query_x"), PyUnicode_InternFromString("query_y")};
    if (samples_.empty() || !watch_ || watch_->changed()) return py::none();
    std::array<Address, 5> places;
    dlpack::Tensor t;
    std::array<py::object, 4> kept;  // another thread may give the tasks' fields away
    for (int i = 0; i < 4; ++i) {
      kept[i] = py::reinterpret_steal<py::object>(PyObject_GetAttr(tasks.ptr(), names[i]));
      if (!kept[i]) throw py::error_already_set();
      if (!reader_->read(kept[i].ptr(), t) || !samples_[i].fits(t) || !Layout::contiguous(t)) {
        return py::none();
      }
      places[i] = Layout::address(t);
    }
    if (!reader_->read(loss.ptr(), t)) return py::none();
    places[4] = Layout::address(t);
    return run(places, false, false, workspace, bytes);
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
        for (const auto& [from, to, n] : sums_) {
          const Rows<S> sum{at<S>(to), 0};
          call_.backend->vector.add(1, n, {at<const S>(from), 0}, sum, call_.exec);
        }
        *at<S>(places[4]) = S(plan_.loss);
        for (index_t t = 0; t < rows; ++t) accuracy += call_.query_accuracy[t * row + call_.steps];
      }
    }
    if (!enough) return py::none();
    return py::make_tuple(plan_.loss, accuracy / double(rows), std::move(metrics));
  }

  // For memory that is not the host's: as `run`, but the metrics, double [2, T, K + 1], are at an
  // address there, nothing is read and nobody waits. False if the workspace is too small.
  bool launch(const std::array<Address, 5>& places, bool support_last, bool query_last,
              Address workspace, index_t bytes, Address stream, Address metrics) {
    check();
    py::gil_scoped_release release;
    plan(support_last, query_last);
    if (plan_.bytes > bytes) return false;
    call_.exec.context = at<const void>(stream);
    call_.loss = at<S>(places[4]);
    start({places[0], places[1], places[2], places[3]}, at<double>(metrics), workspace);
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
    plan_.loss = meta_gradient(call_, plan_, at<void>(workspace));
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
  Sums sums_;
  std::shared_ptr<Watch> watch_;
  std::shared_ptr<TensorReader> reader_;
  std::vector<Layout> samples_;
};

template <class S>
void define(py::module_& m, const char* name) {
  using P = Prepared<S>;
  py::class_<P>(m, name)
      .def(py::init<const PlaceTuple&, const Program&, index_t, index_t, bool, int,
                    const std::vector<double>&, index_t, index_t, int, index_t,
                    const std::vector<std::uint8_t>&>(),
           py::keep_alive<1, 3>())
      .def("set_parameters", &P::set_parameters, py::arg("addresses"), py::arg("watch").none(true))
      .def("set_rates", &P::set_rates)
      .def("set_gradients", &P::set_gradients)
      .def("expect", &P::expect)
      .def("again", &P::again)
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
