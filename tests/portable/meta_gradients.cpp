// Second-order meta-gradients of two small networks, written number by number to the file that the
// argument names: tests/test_portable.py compares what builds for different processors write.
// Inputs are made of integers alone, so that every processor starts from the same bits.
#include <fstream>
#include <iomanip>
#include <vector>

#include "cpu/backend_cpu.h"
#include "cpu/parallel.h"
#include "meta/options.h"

namespace {

using fm::index_t;

constexpr index_t kTasks = 3, kSamples = 6, kSteps = 2, kWays = 5;

struct Numbers {
  std::uint64_t state = 1;
  double next() {  // in (-1, 1), a multiple of 2^-20
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return double(std::int64_t(state >> 43) - (1 << 20)) / (1 << 20);
  }
};

fm::LayerSpec layer(const char* kind, index_t in = 0, index_t out = 0) {
  fm::LayerSpec s;
  s.kind = kind;
  s.name = kind;
  s.in = in;
  s.out = out;
  s.has_weight = s.has_bias = out > 0;
  return s;
}

std::vector<fm::LayerSpec> convolutional() {
  fm::LayerSpec conv = layer("conv2d", 3, 10), norm = layer("batch_norm", 10), pool;
  conv.window = {{3, 3}, {1, 1}, {1, 1}};
  norm.has_weight = norm.has_bias = true;
  norm.eps = 1e-3;
  pool.kind = pool.name = "max_pool2d";
  pool.window = {{2, 2}, {2, 2}, {0, 0}};
  return {conv, norm, layer("relu"), pool, layer("flatten"), layer("linear", 90, kWays)};
}

std::vector<fm::LayerSpec> dense() {
  return {layer("linear", 3, 40), layer("relu"), layer("linear", 40, 19), layer("tanh"),
          layer("linear", 19, 1)};
}

template <class S>
void write(std::ofstream& out, const char* name, const fm::Program& program, index_t inputs) {
  Numbers numbers;
  const auto draw = [&](index_t n, double scale) {
    std::vector<S> values;
    for (index_t i = 0; i < n; ++i) values.push_back(S(scale * numbers.next()));
    return values;
  };
  std::vector<std::vector<S>> params, gradients;
  fm::MetaCall<S> call;
  for (const fm::Parameter& p : program.parameters()) {
    params.push_back(draw(p.count, 0.5));
    gradients.emplace_back(p.count);
  }
  for (size_t i = 0; i < params.size(); ++i) {
    call.params.tensors.push_back(params[i].data());
    call.gradients.tensors.push_back(gradients[i].data());
  }
  const std::vector<S> x = draw(2 * kTasks * kSamples * inputs, 1), y = draw(kTasks * kSamples, 1);
  std::vector<std::int64_t> labels;
  for (index_t i = 0; i < kTasks * kSamples; ++i) labels.push_back(i % kWays);
  const void* target = program.loss() == fm::LossKind::cross_entropy
                           ? static_cast<const void*>(labels.data())
                           : static_cast<const void*>(y.data());
  const S rate = S(0.05);
  std::vector<double> losses(2 * kTasks * (kSteps + 1));
  call.program = &program;
  call.backend = &fm::cpu::backend<S>();
  call.tasks = kTasks;
  call.slots = call.backend->slots(kTasks);
  call.steps = kSteps;
  call.loss_weights = {0, 0, 1};
  call.rates.values = &rate;
  call.rates.adapted.assign(params.size(), 1);
  call.support = {x.data(), target, kSamples, false};
  call.query = {x.data() + kTasks * kSamples * inputs, target, kSamples, false};
  call.query_loss = losses.data();
  call.query_accuracy = losses.data() + kTasks * (kSteps + 1);
  const fm::CallPlan plan = fm::plan_meta_gradient(call);
  std::vector<char> memory(plan.bytes + 64);
  void* workspace = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64);
  out << name << " loss " << fm::meta_gradient(call, plan, workspace) << "\n";
  for (const auto& g : gradients) {
    for (S value : g) out << name << " gradient " << double(value) << "\n";
  }
}

}  // namespace

int main(int, char** arguments) {
  std::ofstream out(arguments[1]);
  out << std::setprecision(17);
  fm::cpu::set_num_threads(2);
  const fm::Program images({3, 6, 6}, convolutional(), {"cross_entropy", "mean"});
  const fm::Program vectors({3}, dense(), {"mse", "mean"});
  write<double>(out, "convolutional float64", images, 3 * 6 * 6);
  write<float>(out, "convolutional float32", images, 3 * 6 * 6);
  write<double>(out, "dense float64", vectors, 3);
  write<float>(out, "dense float32", vectors, 3);
}
