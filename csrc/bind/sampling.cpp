// Batches of tasks, written into tensors that the caller has made to measure.
#include <array>

#include "bind/arguments.h"
#include "bind/module.h"
#include "cpu/parallel.h"
#include "cpu/tasks.h"
#include "tasks/philox.h"
#include "tasks/sampling.h"

namespace fm::bind {
namespace {

using Pair = std::pair<double, double>;
using Four = std::array<std::uint32_t, 4>;

// Pixels that are worth waking a thread for.
constexpr index_t kGrain = index_t(1) << 18;

tasks::Range range(const Pair& p) { return {p.first, p.second}; }

// Waves of given ranges and numbers of samples.
template <class S>
class SinusoidTasks {
 public:
  SinusoidTasks(index_t support, index_t queries, const Pair& amplitude, const Pair& phase,
                const Pair& x) {
    call_.support = support;
    call_.queries = queries;
    call_.amplitude = range(amplitude);
    call_.phase = range(phase);
    call_.x = range(x);
  }

  // `places`: x and y of the support, x and y of the query, amplitudes and phases (or 0).
  void draw(std::uint64_t key, std::uint64_t first, index_t tasks,
            const std::array<Address, 4>& places, Address amplitudes, Address phases) const {
    tasks::Sinusoids<S> call = call_;
    call.stream = {key, first, tasks};
    call.support_x = at<S>(places[0]);
    call.support_y = at<S>(places[1]);
    call.query_x = at<S>(places[2]);
    call.query_y = at<S>(places[3]);
    call.amplitudes = at<S>(amplitudes);
    call.phases = at<S>(phases);
    py::gil_scoped_release release;
    tasks::sample(call);
  }

 private:
  tasks::Sinusoids<S> call_;
};

template <class S>
void define_sinusoids(py::module_& m, const char* name) {
  py::class_<SinusoidTasks<S>>(m, name)
      .def(py::init<index_t, index_t, const Pair&, const Pair&, const Pair&>())
      .def("draw", &SinusoidTasks<S>::draw);
}

template <class S>
void gather(Address images, index_t pixels, const std::int64_t* rows, index_t n, S* out) {
  struct Gather {
    const std::uint8_t* images;
    index_t pixels;
    const std::int64_t* rows;
    S* out;
  } call{at<const std::uint8_t>(images), pixels, rows, out};
  cpu::for_each_range(
      n, max_of<index_t>(1, kGrain / pixels),
      [](void* state, index_t begin, index_t end) {
        const Gather& c = *static_cast<const Gather*>(state);
        tasks::gather_images(c.images, c.pixels, c.rows, begin, end, c.out);
      },
      &call);
}

// (classes, drawings, ways, shots, queries, pixels)
using FewShotSizes = std::array<index_t, 6>;

template <class S>
void few_shot(std::uint64_t key, std::uint64_t first, index_t tasks, const FewShotSizes& sizes,
              Address images, Address support_x, Address support_y, Address query_x,
              Address query_y) {
  const auto [classes, drawings, ways, shots, queries, pixels] = sizes;
  require(0 < ways && ways <= classes, "ways: expected 1 to ", classes, ", got ", ways);
  require(0 < shots && 0 < queries && shots + queries <= drawings,
          "shots + queries: expected at most ", drawings, ", got ", shots, " + ", queries);
  py::gil_scoped_release release;
  const index_t s = tasks * ways * shots, q = tasks * ways * queries;
  std::vector<std::int64_t> rows(s + q);
  const tasks::Episodes call{{key, first, tasks}, classes, drawings, ways, shots, queries};
  tasks::sample(call, rows.data(), rows.data() + s);
  tasks::write_labels(tasks, ways, shots, at<std::int64_t>(support_y));
  tasks::write_labels(tasks, ways, queries, at<std::int64_t>(query_y));
  gather<S>(images, pixels, rows.data(), s, at<S>(support_x));
  gather<S>(images, pixels, rows.data() + s, q, at<S>(query_x));
}

// One block of the generator, for known-answer tests.
Four philox(const Four& counter, const std::array<std::uint32_t, 2>& key) {
  const tasks::Words w =
      tasks::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {w.word[0], w.word[1], w.word[2], w.word[3]};
}

}  // namespace

void define_sampling(py::module_& m) {
  define_sinusoids<float>(m, "SinusoidsFloat32");
  define_sinusoids<double>(m, "SinusoidsFloat64");
  m.def("few_shot_float32", &few_shot<float>);
  m.def("few_shot_float64", &few_shot<double>);
  m.def("philox4x32", &philox);
}

}  // namespace fm::bind
