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

// Support and query, x and y, then amplitudes and phases (or 0).
template <class S>
void sinusoids(std::uint64_t key, std::uint64_t first, index_t tasks, index_t support,
               index_t queries, const Pair& amplitude, const Pair& phase, const Pair& x,
               Address support_x, Address support_y, Address query_x, Address query_y,
               Address amplitudes, Address phases) {
  tasks::sample(tasks::Sinusoids<S>{{key, first, tasks},
                                    support,
                                    queries,
                                    range(amplitude),
                                    range(phase),
                                    range(x),
                                    at<S>(support_x),
                                    at<S>(support_y),
                                    at<S>(query_x),
                                    at<S>(query_y),
                                    at<S>(amplitudes),
                                    at<S>(phases)});
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
  m.def("sinusoids_float32", &sinusoids<float>);
  m.def("sinusoids_float64", &sinusoids<double>);
  m.def("few_shot_float32", &few_shot<float>);
  m.def("few_shot_float64", &few_shot<double>);
  m.def("philox4x32", &philox);
}

}  // namespace fm::bind
