// Steps of outer optimizers: the addresses of a group's tensors are kept, one call updates all.
#include "bind/arguments.h"
#include "bind/backends.h"
#include "bind/module.h"

namespace fm::bind {
namespace {

using Counts = std::vector<index_t>;

template <class S>
std::vector<S*> pointers(const char* name, const Addresses& addresses, size_t expected) {
  require(addresses.size() == expected, name, ": expected ", expected, " addresses, got ",
          addresses.size());
  std::vector<S*> list;
  for (Address a : addresses) list.push_back(at<S>(a));
  return list;
}

// Where a step runs: (backend, stream, learning rate in backend memory or 0).
using StepPlace = std::tuple<int, Address, Address>;

Exec exec_of(const StepPlace& where) {
  Exec exec;
  exec.context = at<const void>(std::get<1>(where));
  return exec;
}

template <class S>
const OptimizerOps<S>& ops_of(const StepPlace& where) {
  return backend<S>(BackendKind(std::get<0>(where))).optimizer;
}

template <class S>
class Adam {
 public:
  // `steps` are counters in float32, as torch keeps them; `largest` is empty without amsgrad;
  // `arrivals` is a zero in backend memory, or 0 where that is the host's.
  Adam(const Counts& counts, const Addresses& params, const Addresses& gradients,
       const Addresses& means, const Addresses& squares, const Addresses& largest,
       const Addresses& steps, Address arrivals)
      : arrivals_(at<unsigned>(arrivals)) {
    const size_t n = counts.size();
    const auto p = pointers<S>("params", params, n), g = pointers<S>("gradients", gradients, n),
               m = pointers<S>("exp_avg", means, n), v = pointers<S>("exp_avg_sq", squares, n),
               top = pointers<S>("max_exp_avg_sq", largest, largest.empty() ? 0 : n);
    const auto t = pointers<float>("step", steps, n);
    for (size_t i = 0; i < n; ++i) {
      tensors_.push_back(
          {counts[i], g[i], p[i], m[i], v[i], largest.empty() ? nullptr : top[i], t[i]});
    }
  }

  void step(const StepPlace& where, double lr, double beta1, double beta2, double eps,
            double weight_decay, bool decoupled, bool maximize) {
    py::gil_scoped_release release;
    const math::AdamOptions options{lr, beta1, beta2, eps, weight_decay, decoupled, maximize};
    ops_of<S>(where).adam(options, at<const double>(std::get<2>(where)), arrivals_, tensors_.data(),
                          index_t(tensors_.size()), exec_of(where));
  }

 private:
  std::vector<AdamTensor<S>> tensors_;
  unsigned* arrivals_;
};

template <class S>
class Sgd {
 public:
  // `buffers` is empty without momentum; those of `first` hold nothing yet.
  Sgd(const Counts& counts, const Addresses& params, const Addresses& gradients,
      const Addresses& buffers, const std::vector<std::uint8_t>& first) {
    const size_t n = counts.size();
    const auto p = pointers<S>("params", params, n), g = pointers<S>("gradients", gradients, n),
               b = pointers<S>("momentum_buffer", buffers, buffers.empty() ? 0 : n);
    require(first.size() == buffers.size(), "first: expected ", buffers.size(), " flags, got ",
            first.size());
    for (size_t i = 0; i < n; ++i) {
      tensors_.push_back({counts[i], g[i], p[i], buffers.empty() ? nullptr : b[i],
                          !buffers.empty() && first[i] != 0});
    }
  }

  void step(const StepPlace& where, double lr, double momentum, double dampening,
            double weight_decay, bool nesterov, bool maximize) {
    py::gil_scoped_release release;
    const math::SgdRule<S> rule{S(maximize ? -1 : 1), S(weight_decay), S(lr), S(momentum),
                                S(1 - dampening),     nesterov,        false};
    ops_of<S>(where).sgd(rule, at<const double>(std::get<2>(where)), tensors_.data(),
                         index_t(tensors_.size()), exec_of(where));
    for (SgdTensor<S>& t : tensors_) t.first = false;
  }

 private:
  std::vector<SgdTensor<S>> tensors_;
};

template <class S>
void define(py::module_& m, const std::string& dtype) {
  py::class_<Adam<S>>(m, ("Adam" + dtype).c_str())
      .def(py::init<const Counts&, const Addresses&, const Addresses&, const Addresses&,
                    const Addresses&, const Addresses&, const Addresses&, Address>())
      .def("step", &Adam<S>::step);
  py::class_<Sgd<S>>(m, ("Sgd" + dtype).c_str())
      .def(py::init<const Counts&, const Addresses&, const Addresses&, const Addresses&,
                    const std::vector<std::uint8_t>&>())
      .def("step", &Sgd<S>::step);
}

}  // namespace

void define_optimizers(py::module_& m) {
  define<float>(m, "Float32");
  define<double>(m, "Float64");
}

}  // namespace fm::bind
