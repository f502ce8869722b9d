// Steps of outer optimizers: the addresses of a group's tensors are kept, one call updates all.
#include "bind/arguments.h"
#include "bind/module.h"
#include "cpu/backend_cpu.h"

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

template <class S>
class Adam {
 public:
  // `steps` are counters in float32, as torch keeps them; `largest` is empty without amsgrad.
  Adam(const Counts& counts, const Addresses& params, const Addresses& gradients,
       const Addresses& means, const Addresses& squares, const Addresses& largest,
       const Addresses& steps)
      : counts_(counts),
        params_(pointers<S>("params", params, counts.size())),
        gradients_(pointers<S>("gradients", gradients, counts.size())),
        means_(pointers<S>("exp_avg", means, counts.size())),
        squares_(pointers<S>("exp_avg_sq", squares, counts.size())),
        largest_(pointers<S>("max_exp_avg_sq", largest, largest.empty() ? 0 : counts.size())),
        steps_(pointers<float>("step", steps, counts.size())) {}

  void step(double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
            bool maximize) {
    py::gil_scoped_release release;
    const math::AdamOptions options{lr, beta1, beta2, eps, weight_decay, decoupled, maximize};
    const OptimizerOps<S>& ops = cpu::backend<S>().optimizer;
    math::AdamRule<S> rule{};
    for (size_t i = 0; i < counts_.size(); ++i) {
      const float t = *steps_[i] += 1;
      if (i == 0 || t != *steps_[i - 1]) rule = math::adam_rule<S>(options, double(t));
      ops.adam(rule, counts_[i], gradients_[i], params_[i], means_[i], squares_[i],
               largest_.empty() ? nullptr : largest_[i]);
    }
  }

 private:
  Counts counts_;
  std::vector<S*> params_, gradients_, means_, squares_, largest_;
  std::vector<float*> steps_;
};

template <class S>
class Sgd {
 public:
  // `buffers` is empty without momentum; those of `first` hold nothing yet.
  Sgd(const Counts& counts, const Addresses& params, const Addresses& gradients,
      const Addresses& buffers, const std::vector<std::uint8_t>& first)
      : counts_(counts),
        params_(pointers<S>("params", params, counts.size())),
        gradients_(pointers<S>("gradients", gradients, counts.size())),
        buffers_(pointers<S>("momentum_buffer", buffers, buffers.empty() ? 0 : counts.size())),
        first_(first) {
    require(first.size() == buffers.size(), "first: expected ", buffers.size(), " flags, got ",
            first.size());
  }

  void step(double lr, double momentum, double dampening, double weight_decay, bool nesterov,
            bool maximize) {
    py::gil_scoped_release release;
    const OptimizerOps<S>& ops = cpu::backend<S>().optimizer;
    math::SgdRule<S> rule{S(maximize ? -1 : 1), S(weight_decay), S(lr), S(momentum),
                          S(1 - dampening),     nesterov,        false};
    for (size_t i = 0; i < counts_.size(); ++i) {
      if (!buffers_.empty()) {
        rule.first = first_[i];
        first_[i] = 0;
      }
      ops.sgd(rule, counts_[i], gradients_[i], params_[i],
              buffers_.empty() ? nullptr : buffers_[i]);
    }
  }

 private:
  Counts counts_;
  std::vector<S*> params_, gradients_, buffers_;
  std::vector<std::uint8_t> first_;
};

template <class S>
void define(py::module_& m, const std::string& dtype) {
  py::class_<Adam<S>>(m, ("Adam" + dtype).c_str())
      .def(py::init<const Counts&, const Addresses&, const Addresses&, const Addresses&,
                    const Addresses&, const Addresses&, const Addresses&>())
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
