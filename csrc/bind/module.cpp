// The Python module fastmaml._core: integers, pointers and a workspace cross; nothing else.
//
// Each call comes in two dtypes and answers with its plan. A call whose workspace is too small
// computes nothing: the caller reads `plan.bytes`, brings more, and calls again. Pointers have been
// checked by fastmaml/_native.py, which is the only caller. The GIL is released while it runs.
#include "bind/module.h"
#include "bind/arguments.h"
#include "bind/backends.h"
#include "bind/bench.h"
#include "common/error.h"
#include "cpu/backend_cpu.h"
#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "cuda/settings.h"

namespace fm {
namespace {

index_t number(const py::dict& d, const char* key, index_t otherwise) {
  return d.contains(key) ? d[key].cast<index_t>() : otherwise;
}

void pair_of(const py::dict& d, const char* key, index_t (&out)[2]) {
  if (!d.contains(key)) return;
  const auto values = d[key].cast<std::vector<index_t>>();
  require(values.size() == 2, key, ": expected two numbers, got ", values.size());
  out[0] = values[0];
  out[1] = values[1];
}

LayerSpec layer_spec(const std::string& kind, const std::string& name, const py::dict& d) {
  LayerSpec s;
  s.kind = kind;
  s.name = name;
  s.in = number(d, "in_features", number(d, "in_channels", number(d, "features", 0)));
  s.out = number(d, "out_features", number(d, "out_channels", number(d, "size", 0)));
  s.has_weight = number(d, "scale", 0);
  s.has_bias = number(d, "bias", number(d, "shift", 0));
  pair_of(d, "kernel", s.window.kernel);
  pair_of(d, "stride", s.window.stride);
  pair_of(d, "padding", s.window.padding);
  if (d.contains("eps")) s.eps = d["eps"].cast<double>();
  for (const char* key : {"alpha", "slope"}) {
    if (d.contains(key)) s.alpha = d[key].cast<double>();
  }
  if (d.contains("shape")) s.shape = d["shape"].cast<std::vector<index_t>>();
  return s;
}

using LayerTuple = std::tuple<std::string, std::string, py::dict>;

std::unique_ptr<Program> make_program(const std::vector<index_t>& input,
                                      const std::vector<LayerTuple>& layers,
                                      const std::string& loss, const std::string& reduction) {
  std::vector<LayerSpec> specs;
  for (const auto& [kind, name, attributes] : layers) {
    specs.push_back(layer_spec(kind, name, attributes));
  }
  return std::make_unique<Program>(input, specs, LossSpec{loss, reduction});
}

using WorkspacePair = std::pair<Address, index_t>;  // address, bytes

template <class Call, class Run>
CallPlan execute(const Call& call, CallPlan (*plan_of)(const Call&), Run&& run,
                 const WorkspacePair& workspace) {
  py::gil_scoped_release release;
  CallPlan plan = plan_of(call);
  if (plan.bytes <= workspace.second) run(at<void>(workspace.first), plan);
  return plan;
}

template <class S>
CallPlan call_meta_gradient(const bind::PlaceTuple& where, const Program& program, index_t tasks,
                            index_t steps, bool first_order, int memory,
                            const std::vector<double>& loss_weights, const Addresses& params,
                            bool per_task, const RatesTuple& rate, const SamplesTuple& support,
                            const SamplesTuple& query, const Addresses& gradients,
                            Address rate_gradient, Address query_loss, Address query_accuracy,
                            const WorkspacePair& workspace) {
  MetaCall<S> call;
  call.program = &program;
  bind::place(call, where);
  call.tasks = tasks;
  call.slots = call.backend->slots(tasks);
  call.steps = steps;
  call.first_order = first_order;
  call.memory = Memory(memory);
  call.loss_weights = loss_weights;
  require(index_t(loss_weights.size()) == steps + 1, "loss_weights: expected ", steps + 1,
          " weights, one after each of 0 to ", steps, " steps, got ", loss_weights.size());
  call.params = tensors<const S>(program, params, per_task);
  call.rates = rates<S>(program, rate);
  call.rates.adapted_there = at<const std::uint8_t>(std::get<4>(where));
  call.support = samples<S>(support);
  call.query = samples<S>(query);
  call.gradients = tensors<S>(program, gradients, false);
  call.rate_gradient = at<S>(rate_gradient);
  call.query_loss = at<double>(query_loss);
  call.query_accuracy = at<double>(query_accuracy);
  return execute(
      call, plan_meta_gradient<S>,
      [&](void* memory, CallPlan& plan) { plan.loss = meta_gradient(call, plan, memory); },
      workspace);
}

template <class S>
CallPlan call_adapt(const bind::PlaceTuple& where, const Program& program, index_t tasks,
                    index_t steps, const Addresses& params, bool per_task, const RatesTuple& rate,
                    const SamplesTuple& support, const SamplesTuple& query,
                    const Addresses& adapted, Address query_loss, Address query_accuracy,
                    const WorkspacePair& workspace) {
  AdaptCall<S> call;
  call.program = &program;
  bind::place(call, where);
  call.tasks = tasks;
  call.slots = call.backend->slots(tasks);
  call.steps = steps;
  call.params = tensors<const S>(program, params, per_task);
  call.rates = rates<S>(program, rate);
  call.rates.adapted_there = at<const std::uint8_t>(std::get<4>(where));
  call.support = samples<S>(support);
  call.query = samples<S>(query);
  if (!adapted.empty()) call.adapted = tensors<S>(program, adapted, true);
  call.query_loss = at<double>(query_loss);
  call.query_accuracy = at<double>(query_accuracy);
  return execute(
      call, plan_adapt<S>, [&](void* memory, CallPlan&) { adapt(call, memory); }, workspace);
}

template <class S>
CallPlan call_product(const bind::PlaceTuple& where, const Program& program, int product_kind,
                      index_t tasks, const Addresses& params, bool per_task,
                      const Addresses& vector, bool vector_per_task, const SamplesTuple& batch,
                      Address output, Address loss, Address accuracy, const Addresses& result,
                      Address kept, bool filled, const WorkspacePair& workspace) {
  ProductCall<S> call;
  call.program = &program;
  bind::place(call, where);
  call.tasks = tasks;
  call.slots = call.backend->slots(tasks);
  call.product = Product(product_kind);
  call.params = tensors<const S>(program, params, per_task);
  if (!vector.empty()) call.vector = tensors<const S>(program, vector, vector_per_task);
  call.samples = samples<S>(batch);
  call.output = at<S>(output);
  call.loss = at<double>(loss);
  call.accuracy = at<double>(accuracy);
  if (!result.empty()) call.result = tensors<S>(program, result, true);
  call.kept = at<S>(kept);
  call.filled = filled;
  return execute(
      call, plan_product<S>, [&](void* memory, CallPlan&) { product(call, memory); }, workspace);
}

py::dict build_info() {
  py::dict info;
  info["version"] = FM_VERSION;
  info["build"] = FM_BUILD_INFO;
  info["cuda"] = FM_CUDA_BUILD;  // for people; the next one for programs
#if defined(FM_HAVE_CUDA)
  info["cuda_backend"] = "cuda";
#elif defined(FM_HAVE_CUDA_EMULATED)
  info["cuda_backend"] = "cuda_emulated";
#else
  info["cuda_backend"] = "none";
#endif
#if defined(FM_HAVE_CUDA) || defined(FM_HAVE_CUDA_EMULATED)
  info["early_launches"] = early_launches() ? "on" : "off (FASTMAML_EARLY_LAUNCH=0)";
#endif
  info["isas"] = cpu::usable_isas();
  info["isa"] = cpu::current_isa();
  info["threads"] = cpu::num_threads();
#if defined(__VERSION__)
  info["compiler"] = __VERSION__;
#endif
  return info;
}

template <class S>
void define_calls(py::module_& m, const std::string& dtype) {
  m.def(("meta_gradient_" + dtype).c_str(), &call_meta_gradient<S>);
  m.def(("adapt_" + dtype).c_str(), &call_adapt<S>);
  m.def(("product_" + dtype).c_str(), &call_product<S>);
}

}  // namespace
}  // namespace fm

PYBIND11_MODULE(_core, m) {
  using namespace fm;
  m.doc() = "The compiled engine of fastmaml. Use it through fastmaml.engines.native.";
  py::class_<Program>(m, "Program")
      .def(py::init(&make_program))
      .def_property_readonly("outputs", [](const Program& p) { return p.output().size(); })
      .def_property_readonly("target_size", &Program::target_size)
      .def("kept_tape_size", &kept_tape_size)
      .def("tables",
           [](const Program& p) {
             const std::vector<char> bytes = p.tables();
             return py::bytes(bytes.data(), bytes.size());
           })
      .def_property_readonly("layers", &Program::names)
      .def_property_readonly("parameters", [](const Program& p) {
        std::vector<std::pair<std::string, index_t>> list;
        for (const Parameter& q : p.parameters()) list.emplace_back(q.name, q.count);
        return list;
      });
  py::class_<CallPlan>(m, "CallPlan")
      .def_readonly("bytes", &CallPlan::bytes)
      .def_readonly("slots", &CallPlan::slots)
      .def_readonly("slot_bytes", &CallPlan::slot_bytes)
      .def_readonly("shared_bytes", &CallPlan::shared_bytes)
      .def_readonly("tape_bytes", &CallPlan::tape_bytes)
      .def_readonly("kept", &CallPlan::kept)
      .def_readonly("resident", &CallPlan::resident)
      .def_readonly("factored", &CallPlan::factored)
      .def_readonly("loss", &CallPlan::loss);
  define_calls<float>(m, "float32");
  define_calls<double>(m, "float64");
  bind::define_backends(m);
  bind::define_launches(m);
  bind::define_prepared(m);
  bind::define_optimizers(m);
  bind::define_sampling(m);
  bind::define_device_sampling(m);
  bind::define_emulation(m);
  bind::define_watch(m);
  m.attr("KEEP_BYTES") = kKeepBytes;
  m.def("build_info", &build_info);
  m.def("num_threads", &cpu::num_threads);
  m.def("set_num_threads", &cpu::set_num_threads);
  m.def("use_isa", &cpu::use_isa);
  m.def("wish_for_huge_pages",
        [](Address memory, index_t bytes) { cpu::wish_for_huge_pages(at<char>(memory), bytes); });
  define_bench(m);
}
