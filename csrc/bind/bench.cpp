// For bench/ alone: one pass of one layer, over and over, and what the processor can do at most.
//
// `LayerBench` holds the data of several tasks, float32, each with activations, adjoints and
// tangents of its own as one run over the whole network left them. A timed pass takes the tasks in
// turn, so that it doesn't meet in a cache what it has just written there, and writes again what
// was there before. Everything runs on the calling thread.
#include "bind/bench.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/error.h"
#include "cpu/backend_cpu.h"
#include "program/plan.h"

namespace py = pybind11;

namespace fm {

const char* kind_name(LayerKind kind) {
  static const char* const names[] = {
      "bilinear",        "batch_norm", "batch_norm_pool", "layer_norm", "relu",
      "leaky_relu",      "tanh",       "sigmoid",         "silu",       "gelu",
      "gelu_tanh",       "elu",        "softplus",        "max_pool",   "average_pool",
      "append_parameter"};
  static_assert(sizeof(names) / sizeof(*names) == size_t(LayerKind::count), "a name a kind");
  return names[int(kind)];
}

namespace {

using S = float;

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

// Seconds of one call of body(i), the mean over i = 0 .. repeats - 1.
template <class Body>
double timed(index_t repeats, Body&& body) {
  require(repeats > 0, "repeats: expected at least one, got ", repeats);
  const double start = now();
  for (index_t i = 0; i < repeats; ++i) body(i);
  return (now() - start) / double(repeats);
}

// Floats that start on a cache line.
class Buffer {
 public:
  explicit Buffer(index_t count) : memory_(count + kAlignment / sizeof(S)) {}
  S* begin() {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    return memory_.data() + (align_up(index_t(address), kAlignment) - index_t(address)) / sizeof(S);
  }

 private:
  std::vector<S> memory_;
};

// Multiply-adds of one sample's product; padding is not multiplied, so it does not count.
index_t multiply_adds(const LayerDesc& d) {
  if (d.kind != LayerKind::bilinear) return 0;
  index_t macs = 0;
  for (const PixelGroup& group : d.geometry->forward.groups) {
    index_t taps = 0;
    for (const TapRun& run : group.runs) taps += run.length;
    macs += taps * index_t(group.rows.size()) * d.out.channels;
  }
  return macs;
}

class LayerBench {
 public:
  LayerBench(const Program& program, index_t samples, index_t tasks)
      : program_(program),
        backend_(cpu::backend<S>()),
        samples_(samples),
        tasks_(tasks),
        tape_(plan_tape(program, samples, false)),
        tangent_(plan_tangent(program, samples)) {
    require(samples > 0, "samples: expected at least one, got ", samples);
    require(tasks > 0, "tasks: expected at least one, got ", tasks);
    Arena arena;
    const index_t P = program.param_count();
    for (index_t* at : {&theta_, &direction_, &dw_, &tdw_}) *at = arena.take(P);
    x_ = arena.take(samples * program.input().size());
    target_ = arena.take(2 * samples * program.target_size());  // room for int64 labels
    tape_at_ = arena.take(tape_.size);
    tangent_at_ = arena.take(tangent_.size);
    scratch_ = arena.take(plan_scratch(program, samples));
    rates_ = arena.take(index_t(program.segments().size()));
    size_ = arena.size();
    memory_ = std::make_unique<Buffer>(size_ * tasks);
    for (index_t t = 0; t < tasks; ++t) fill(t);
    for (index_t t = 0; t < tasks; ++t) run(t);
  }

  index_t bytes_per_task() const { return size_ * index_t(sizeof(S)); }

  // "forward", "backward", "tangent_forward" or "tangent_backward" of one layer
  double time_pass(index_t layer, const std::string& pass, index_t repeats) {
    require(layer >= 0 && layer < depth(), "layer: expected 0 to ", depth() - 1, ", got ", layer);
    const auto run = pass_of(size_t(layer), pass);
    require(pass == "forward" || layer >= program_.first_trainable(), "layer ", layer, " has no ",
            pass, ": nothing before layer ", program_.first_trainable(), " is trained");
    return timed(repeats, [&](index_t i) {
      const index_t t = i % tasks_;
      run_pass(run, size_t(layer), t);
    });
  }

  double time_loss(bool hessian, index_t repeats) {
    const auto& ops = backend_.losses[int(program_.loss())];
    return timed(repeats, [&](index_t i) {
      const index_t t = i % tasks_;
      (hessian ? ops.hessian : ops.value)(loss_args(t), exec(t));
    });
  }

  // One operation on a task's whole parameters.
  double time_vector(const std::string& name, index_t repeats) {
    const auto& v = backend_.vector;
    const index_t P = program_.param_count();
    const auto each = [&](auto&& body) {
      return timed(repeats, [&](index_t i) { body(i % tasks_); });
    };
    if (name == "descend") {
      return each([&](index_t t) {
        v.descend(rates(t), 1, in(t, theta_), in(t, direction_), out(t, tdw_), {});
      });
    }
    if (name == "scale_by_rates") {
      return each(
          [&](index_t t) { v.scale_by_rates(rates(t), 1, in(t, direction_), out(t, tdw_), {}); });
    }
    if (name == "add") {
      return each([&](index_t t) { v.add(1, P, in(t, direction_), out(t, tdw_), {}); });
    }
    if (name == "copy") {
      return each([&](index_t t) { v.copy(1, P, in(t, direction_), out(t, tdw_), {}); });
    }
    if (name == "load_parameters" || name == "store_parameters") {
      const auto move = name == "load_parameters" ? v.gather : v.scatter;
      return each([&](index_t t) {
        for (const Parameter& p : program_.parameters()) {
          const Move<S> one{p.count, p.index.empty() ? nullptr : p.index.data(),
                            in(t, direction_ + p.offset), out(t, tdw_ + p.offset)};
          move(&one, 1, 1, {});
        }
      });
    }
    if (name == "to_channels_last") {
      const Shape in = program_.input();
      return each([&](index_t t) {
        v.to_channels_last(samples_, in.channels, in.pixels(), at(t, x_), at(t, tape_at_), {});
      });
    }
    fail(
        "vector operation: expected descend, scale_by_rates, add, copy, load_parameters, "
        "store_parameters or to_channels_last, got '",
        name, "'");
  }

  // The mean over `rows` tasks' parameters.
  double time_mean(index_t rows, index_t repeats) {
    const index_t P = program_.param_count();
    Buffer values(rows * P);
    std::memset(values.begin(), 0, rows * P * sizeof(S));
    return timed(repeats, [&](index_t) {
      backend_.vector.mean_rows(rows, P, 0, P, values.begin(), at(0, tdw_), {});
    });
  }

 private:
  index_t depth() const { return index_t(program_.layers().size()); }
  S* at(index_t t, index_t offset) const { return memory_->begin() + t * size_ + offset; }
  Rows<const S> in(index_t t, index_t offset) const { return {at(t, offset), 0}; }
  Rows<S> out(index_t t, index_t offset) const { return {at(t, offset), 0}; }
  S* tape(index_t t, index_t offset) const { return at(t, tape_at_ + offset); }
  S* tangent(index_t t, index_t offset) const { return at(t, tangent_at_ + offset); }
  Exec exec(index_t t) const {
    Exec exec;
    exec.scratch = at(t, scratch_);
    return exec;
  }

  StepRates<S> rates(index_t t) const {
    const auto& segments = program_.segments();
    return {segments.data(), index_t(segments.size()), at(t, rates_), nullptr};
  }

  LayerOps<S>::Pass pass_of(size_t l, const std::string& pass) const {
    const LayerOps<S>& ops = backend_.layers[int(program_.layers()[l].kind)];
    if (pass == "forward") return ops.forward;
    if (pass == "backward") return ops.backward;
    if (pass == "tangent_forward") return ops.tangent_forward;
    if (pass == "tangent_backward") return ops.tangent_backward;
    fail("pass: expected forward, backward, tangent_forward or tangent_backward, got '", pass, "'");
  }

  bool in_strips(size_t l) const { return program_.layers()[l].strip_rows > 0; }

  void run_pass(LayerOps<S>::Pass pass, size_t l, index_t t) const {
    LayerArgs<S> a = args(l, t), above;
    if (in_strips(l)) {
      above = args(l + 1, t);
      a.above = &above;
    }
    pass(a, exec(t));
  }

  // Everything any pass may read or write; each takes what it needs.
  LayerArgs<S> args(size_t l, index_t t) const {
    const bool adjoint = index_t(l) > program_.first_trainable(), last = index_t(l) + 1 == depth();
    LayerArgs<S> a;
    a.desc = &program_.layers()[l];
    a.samples = samples_;
    a.swept_below = l > 0 && in_strips(l - 1);
    a.x = l == 0 ? at(t, x_) : tape(t, tape_.y[l - 1]);
    a.w = at(t, theta_) + a.desc->param_offset;
    a.y = tape(t, tape_.y[l]);
    a.saved = tape(t, tape_.saved[l]);
    a.dy = last ? tape(t, tape_.dz) : tape(t, tape_.dx[l + 1]);
    a.dx = adjoint && !a.swept_below ? tape(t, tape_.dx[l]) : nullptr;
    a.dw = at(t, dw_) + a.desc->param_offset;
    a.tw = at(t, direction_) + a.desc->param_offset;
    a.tx = adjoint ? tangent(t, tangent_.ty[l - 1]) : nullptr;
    a.ty = tangent(t, tangent_.ty[l]);
    a.tdy = last ? tangent(t, tangent_.tdz) : tangent(t, tangent_.tdx[(l + 1) % 2]);
    a.tdx = adjoint && !a.swept_below ? tangent(t, tangent_.tdx[l % 2]) : nullptr;
    a.tdw = at(t, tdw_) + a.desc->param_offset;
    return a;
  }

  LossArgs<S> loss_args(index_t t) const {
    LossArgs<S> a;
    a.samples = samples_;
    a.outputs = program_.output().size();
    a.scale = S(program_.loss_scale(samples_));
    a.z = tape(t, tape_.y.back());
    a.target = at(t, target_);
    a.tz = tangent(t, tangent_.ty.back());
    a.dz = tape(t, tape_.dz);
    a.tdz = tangent(t, tangent_.tdz);
    a.value = const_cast<double*>(&value_);
    a.accuracy = const_cast<double*>(&accuracy_);
    return a;
  }

  // Random parameters that keep activations near one, directions, samples and targets.
  void fill(index_t t) {
    std::mt19937 generator(unsigned(t) + 1);
    std::normal_distribution<S> normal;
    const auto draw = [&](S* out, index_t n, S scale, S shift) {
      for (index_t i = 0; i < n; ++i) out[i] = shift + scale * normal(generator);
    };
    const index_t P = program_.param_count();
    std::fill_n(at(t, 0), size_, S(0));
    for (const LayerDesc& d : program_.layers()) {
      const index_t inputs = d.window.kernel[0] * d.window.kernel[1] * d.in.channels;
      const bool product = d.kind == LayerKind::bilinear;
      draw(at(t, theta_) + d.param_offset, d.param_count,
           product ? S(std::sqrt(2.0 / double(inputs))) : S(0.1), product ? S(0) : S(0.5));
    }
    draw(at(t, direction_), P, S(0.01), S(0));
    draw(at(t, x_), samples_ * program_.input().size(), S(1), S(0));
    for (size_t s = 0; s < program_.segments().size(); ++s) at(t, rates_)[s] = S(0.01);
    if (program_.loss() == LossKind::cross_entropy) {
      auto* labels = reinterpret_cast<std::int64_t*>(at(t, target_));
      for (index_t i = 0; i < samples_; ++i) labels[i] = i % program_.output().size();
    } else {
      draw(at(t, target_), samples_ * program_.target_size(), S(1), S(0));
    }
  }

  // All passes in their order, once.
  void run(index_t t) {
    const size_t first = size_t(program_.first_trainable()), end = size_t(depth());
    const auto& loss = backend_.losses[int(program_.loss())];
    for (size_t l = 0; l < end; ++l) run_pass(pass_of(l, "forward"), l, t);
    loss.value(loss_args(t), exec(t));
    for (size_t l = end; l-- > first;) run_pass(pass_of(l, "backward"), l, t);
    for (size_t l = first; l < end; ++l) run_pass(pass_of(l, "tangent_forward"), l, t);
    loss.hessian(loss_args(t), exec(t));
    for (size_t l = end; l-- > first;) run_pass(pass_of(l, "tangent_backward"), l, t);
  }

  const Program& program_;
  const Backend<S>& backend_;
  index_t samples_, tasks_;
  TapePlan tape_;
  TangentPlan tangent_;
  index_t theta_ = 0, direction_ = 0, dw_ = 0, tdw_ = 0, x_ = 0, target_ = 0, tape_at_ = 0,
          tangent_at_ = 0, scratch_ = 0, rates_ = 0, size_ = 0;
  std::unique_ptr<Buffer> memory_;
  double value_ = 0, accuracy_ = 0;
};

py::list layers_of(const Program& program) {
  py::list list;
  for (size_t l = 0; l < program.layers().size(); ++l) {
    const LayerDesc& d = program.layers()[l];
    py::dict row;
    row["name"] = program.names()[l];
    row["kind"] = kind_name(d.kind);
    row["inputs"] = d.in.size();
    row["outputs"] = d.out.size();
    row["parameters"] = d.param_count;
    row["multiply_adds"] = multiply_adds(d);
    row["window"] = d.window.kernel[0] * d.window.kernel[1];
    row["strips"] = d.strip_rows > 0;
    row["swept_below"] = l > 0 && program.layers()[l - 1].strip_rows > 0;
    row["trained"] = index_t(l) >= program.first_trainable();
    row["adjoint"] = index_t(l) > program.first_trainable();
    list.append(row);
  }
  return list;
}

}  // namespace

void define_bench(py::module_& m) {
  m.def("bench_layers", &layers_of);
  py::class_<LayerBench>(m, "LayerBench")
      .def(py::init<const Program&, index_t, index_t>(), py::keep_alive<1, 2>())
      .def_property_readonly("bytes_per_task", &LayerBench::bytes_per_task)
      .def("time_pass", &LayerBench::time_pass)
      .def("time_loss", &LayerBench::time_loss)
      .def("time_vector", &LayerBench::time_vector)
      .def("time_mean", &LayerBench::time_mean);
  define_ceilings(m);
}

}  // namespace fm
