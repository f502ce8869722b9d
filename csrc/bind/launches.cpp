// For bench/ and tests alone: what a call asks of a GPU, operation by operation and launch by
// launch, at sizes that no emulation could compute in reasonable time.
//
// Between `begin_recording` and `end_recording` the emulated CUDA backend is a table whose entries
// note what they were asked for and pass it on; the launches that follow are noted too, and not run
// unless asked to. So results are whatever memory held. That works because the driver and the
// launchers look into a GPU's memory no more than they may (`host_memory` is false): what is
// launched hangs on shapes alone.
//
// An operation is (what, pass, facts); facts are numbers, and the names of the pointers that were
// given. bench/launches.py turns them into bytes and operations. One recording at a time, from one
// thread.
#include "bind/backends.h"

#include <utility>

#include "bind/bench.h"
#include "bind/module.h"
#include "cuda/backend_cuda.h"

#if defined(FM_HAVE_CUDA_EMULATED)
#include "cuda/machine.h"
#endif

namespace fm::bind {

#if defined(FM_HAVE_CUDA_EMULATED)
namespace {

struct Operation {
  std::string what, pass;
  std::vector<std::pair<const char*, index_t>> facts;
};

struct Launched {
  index_t operation;  // the last one before it; -1: none
  std::string kernel;
  cuda_emulated::dim3 grid;
  unsigned block;
  std::size_t shared;
};

struct Recording {
  bool on = false, run = false;
  std::vector<Operation> operations;
  std::vector<Launched> launches;
} recording_now;

bool observe(const cuda_emulated::Launch& call) {
  recording_now.launches.push_back({index_t(recording_now.operations.size()) - 1,
                                    cuda_emulated::describe(call), call.grid, call.block,
                                    call.shared_bytes});
  return recording_now.run;
}

void note(const char* what, const char* pass, std::vector<std::pair<const char*, index_t>> facts) {
  recording_now.operations.push_back({what, pass, std::move(facts)});
}

template <class S>
void note_layer(const char* pass, const LayerArgs<S>& a) {
  const LayerDesc& d = *a.desc;
  const index_t taps = d.window.kernel[0] * d.window.kernel[1];
  const bool product = d.kind == LayerKind::bilinear;
  note(kind_name(d.kind), pass,
       {{"tasks", a.tasks},
        {"samples", a.samples},
        {"in", d.in.size()},
        {"out", d.out.size()},
        {"channels_in", d.in.channels},
        {"channels_out", d.out.channels},
        {"parameters", d.param_count},
        {"multiply_adds", product ? d.out.size() * taps * d.in.channels : 0},
        {"saved", saved_count(d, a.samples)},
        {"parts", product ? gradient_parts(d, a.samples) : 1},
        {"relu", d.relu},
        {"relu_input", d.relu_input},
        {"own_w", a.w_stride != 0},
        {"tw", a.tw != nullptr},
        {"tx", a.tx != nullptr},
        {"dx", a.dx != nullptr},
        {"dw", a.dw != nullptr},
        {"tdx", a.tdx != nullptr},
        {"tdw", a.tdw != nullptr},
        {"base", a.dw_base != nullptr},
        {"pooled", a.above ? a.above->desc->out.size() : 0}});
}

template <class S, std::size_t Kind, auto Pass>
void layer(const LayerArgs<S>& a, const Exec& exec) {
  using Ops = LayerOps<S>;
  note_layer(Pass == &Ops::forward           ? "forward"
             : Pass == &Ops::backward        ? "backward"
             : Pass == &Ops::tangent_forward ? "tangent_forward"
                                             : "tangent_backward",
             a);
  (cuda_emulated::backend<S>().layers[Kind].*Pass)(a, exec);
}

template <class S, std::size_t Kind, auto Pass>
void loss(const LossArgs<S>& a, const Exec& exec) {
  note("loss", Pass == &LossOps<S>::value ? "value" : "hessian",
       {{"tasks", a.tasks}, {"samples", a.samples}, {"out", a.outputs}, {"dz", a.dz != nullptr}});
  (cuda_emulated::backend<S>().losses[Kind].*Pass)(a, exec);
}

template <class S, std::size_t... Kind>
void record_layers(Backend<S>& b, std::index_sequence<Kind...>) {
  using Ops = LayerOps<S>;
  ((b.layers[Kind] = {layer<S, Kind, &Ops::forward>, layer<S, Kind, &Ops::backward>,
                      layer<S, Kind, &Ops::tangent_forward>,
                      layer<S, Kind, &Ops::tangent_backward>}),
   ...);
}

template <class S, std::size_t... Kind>
void record_losses(Backend<S>& b, std::index_sequence<Kind...>) {
  using Ops = LossOps<S>;
  ((b.losses[Kind] = {loss<S, Kind, &Ops::value>, loss<S, Kind, &Ops::hessian>}), ...);
}

// Elements that a vector operation moves: rows of n for each task, or for all together.
template <class... R>
index_t elements(index_t tasks, index_t n, const R&... rows) {
  return ((rows.data ? (rows.stride ? tasks : 1) * n : 0) + ... + 0);
}

template <class S>
index_t covered(const StepRates<S>& rates) {  // segments are copied to the backend, not computed
  index_t n = 0;
  for (index_t i = 0; i < rates.segment_count; ++i) n += rates.segments[i].count;
  return n;
}

template <class S>
index_t elements(const Move<S>* moves, index_t count, index_t tasks) {
  index_t total = 0;
  for (index_t i = 0; i < count; ++i) {
    total += elements(tasks, moves[i].n, moves[i].src, moves[i].dst);
    if (moves[i].index) total += moves[i].n;
  }
  return total;
}

void note_vector(const char* name, index_t moved) { note("vector", name, {{"elements", moved}}); }

template <class S>
void record_vectors(VectorOps<S>& v) {
  using In = Rows<const S>;
  using Out = Rows<S>;
  using Step = StepRates<S>;
  static const VectorOps<S>& real = cuda_emulated::backend<S>().vector;
  v.descend = [](const Step& a, index_t t, In theta, In g, Out out, const Exec& e) {
    note_vector("descend", elements(t, covered(a), theta, g, out));
    real.descend(a, t, theta, g, out, e);
  };
  v.scale_by_rates = [](const Step& a, index_t t, In x, Out out, const Exec& e) {
    note_vector("scale_by_rates", elements(t, covered(a), x, out));
    real.scale_by_rates(a, t, x, out, e);
  };
  v.segment_dots = [](const Step& a, index_t t, In g, In x, Out out, const Exec& e) {
    note_vector("segment_dots", elements(t, covered(a), g, x));
    real.segment_dots(a, t, g, x, out, e);
  };
  v.negative_product = [](index_t t, index_t n, In g, In x, Out out, const Exec& e) {
    note_vector("negative_product", elements(t, n, g, x, out));
    real.negative_product(t, n, g, x, out, e);
  };
  v.update = [](index_t t, index_t n, In base, S alpha, const S* rate, In x, Out out,
                const Exec& e) {
    note_vector("update", elements(t, n, base, x, out));
    real.update(t, n, base, alpha, rate, x, out, e);
  };
  v.fill = [](index_t t, index_t n, S value, Out out, const Exec& e) {
    note_vector("fill", elements(t, n, out));
    real.fill(t, n, value, out, e);
  };
  v.copy = [](index_t t, index_t n, In x, Out out, const Exec& e) {
    note_vector("copy", elements(t, n, x, out));
    real.copy(t, n, x, out, e);
  };
  v.add = [](index_t t, index_t n, In x, Out out, const Exec& e) {
    note_vector("add", elements(t, n, x, out, out));
    real.add(t, n, x, out, e);
  };
  v.mean_rows = [](index_t rows, index_t n, index_t begin, index_t end, const S* values, S* out,
                   const Exec& e) {
    note_vector("mean_rows", (rows + 1) * (end - begin));
    real.mean_rows(rows, n, begin, end, values, out, e);
  };
  v.mean_tensors = [](const Move<S>* moves, index_t count, index_t t, const TaskLosses<S>& losses,
                      const Exec& e) {
    index_t moved = losses.out ? 4 * t * losses.n : 0;
    for (index_t i = 0; i < count; ++i) moved += (t + 1 + (moves[i].index ? 1 : 0)) * moves[i].n;
    note_vector("mean_tensors", moved);
    real.mean_tensors(moves, count, t, losses, e);
  };
  v.gather = [](const Move<S>* moves, index_t count, index_t t, const Exec& e) {
    note_vector("gather", elements(moves, count, t));
    real.gather(moves, count, t, e);
  };
  v.scatter = [](const Move<S>* moves, index_t count, index_t t, const Exec& e) {
    note_vector("scatter", elements(moves, count, t));
    real.scatter(moves, count, t, e);
  };
  v.to_channels_last = [](index_t n, index_t channels, index_t pixels, const S* src, S* dst,
                          const Exec& e) {
    note_vector("to_channels_last", 2 * n * channels * pixels);
    real.to_channels_last(n, channels, pixels, src, dst, e);
  };
  v.spread_rates = [](index_t rows, index_t n, const std::uint8_t* adapted, const S* values,
                      bool per_tensor, S* out, const Exec& e) {
    note_vector("spread_rates", 2 * rows * n);
    real.spread_rates(rows, n, adapted, values, per_tensor, out, e);
  };
  v.collect_rates = [](index_t rows, index_t n, const std::uint8_t* adapted, const S* values,
                       bool per_tensor, S* out, const Exec& e) {
    note_vector("collect_rates", 2 * rows * n);
    real.collect_rates(rows, n, adapted, values, per_tensor, out, e);
  };
}

// Elements that an optimizer moves: the gradient, and what it reads and writes again.
template <class S>
void record_optimizers(OptimizerOps<S>& o) {
  static const OptimizerOps<S>& real = cuda_emulated::backend<S>().optimizer;
  o.adam = [](const math::AdamOptions& options, const double* lr, unsigned* arrivals,
              const AdamTensor<S>* list, index_t count, const Exec& e) {
    index_t moved = 0;
    for (index_t i = 0; i < count; ++i) moved += (list[i].largest ? 9 : 7) * list[i].n;
    note("optimizer", "adam", {{"elements", moved}});
    real.adam(options, lr, arrivals, list, count, e);
  };
  o.sgd = [](const math::SgdRule<S>& rule, const double* lr, const SgdTensor<S>* list,
             index_t count, const Exec& e) {
    index_t moved = 0;
    for (index_t i = 0; i < count; ++i) moved += (list[i].buffer ? 5 : 3) * list[i].n;
    note("optimizer", "sgd", {{"elements", moved}});
    real.sgd(rule, lr, list, count, e);
  };
}

py::list operations() {
  py::list all;
  for (const Operation& o : recording_now.operations) {
    py::dict facts;
    for (const auto& [name, value] : o.facts) facts[name] = value;
    all.append(py::make_tuple(o.what, o.pass, facts));
  }
  return all;
}

py::list launches() {
  py::list all;
  for (const Launched& l : recording_now.launches) {
    all.append(py::make_tuple(l.operation, l.kernel, py::make_tuple(l.grid.x, l.grid.y, l.grid.z),
                              l.block, l.shared));
  }
  return all;
}

}  // namespace

template <class S>
const Backend<S>* recording_backend() {
  static const Backend<S> all = [] {
    Backend<S> b = cuda_emulated::backend<S>();
    record_layers(b, std::make_index_sequence<std::size_t(LayerKind::count)>());
    record_losses(b, std::make_index_sequence<std::size_t(LossKind::count)>());
    record_vectors(b.vector);
    record_optimizers(b.optimizer);
    return b;
  }();
  return recording_now.on ? &all : nullptr;
}

// begin_recording(run) forgets what was recorded, and says whether launches are run as well;
// end_recording() returns (operations, launches).
void define_launches(py::module_& m) {
  m.def(
      "begin_recording",
      [](bool run) {
        recording_now = {};
        recording_now.on = true;
        recording_now.run = run;
        cuda_emulated::observe_launches(observe);
      },
      py::arg("run") = false);
  m.def("end_recording", [] {
    cuda_emulated::observe_launches(nullptr);
    recording_now.on = false;
    return py::make_tuple(operations(), launches());
  });
}
#else

template <class S>
const Backend<S>* recording_backend() {
  return nullptr;
}

void define_launches(py::module_&) {}
#endif

template const Backend<float>* recording_backend();
template const Backend<double>* recording_backend();

}  // namespace fm::bind
