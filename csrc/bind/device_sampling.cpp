// Batches of tasks that a backend in lockstep makes in its own memory. Nothing is waited for, and
// where the stream of tasks stands is in that memory too, so that a graph can capture a draw.
#include <array>

#include "bind/arguments.h"
#include "bind/backends.h"
#include "bind/module.h"
#include "cuda/sampling.h"

namespace fm::bind {
namespace {

using Pair = std::pair<double, double>;
// (backend, stream of launches)
using LaunchPlace = std::pair<int, Address>;

Exec exec_of(const LaunchPlace& where) {
  Exec exec;
  exec.context = at<const void>(where.second);
  return exec;
}

template <class S>
tasks::SamplingOps<S> ops_of(const LaunchPlace& where) {
  const tasks::SamplingOps<S> ops = sampling_ops<S>(BackendKind(where.first));
  require(ops.sinusoids, "sampling: the backend ", backend_name(BackendKind(where.first)),
          " makes no tasks");
  return ops;
}

tasks::Range range(const Pair& p) { return {p.first, p.second}; }

// `stream` is a tasks::DeviceStream; sizes are samples of the support and the query; `ranges` those
// of amplitude, phase and x; `places` as in sampling.cpp, with amplitudes and phases (or 0) last.
template <class S>
void sinusoids(const LaunchPlace& where, Address stream, index_t tasks,
               const std::array<index_t, 2>& sizes, const std::array<Pair, 3>& ranges,
               const std::array<Address, 6>& places) {
  tasks::Sinusoids<S> call;
  call.stream.tasks = tasks;
  call.support = sizes[0];
  call.queries = sizes[1];
  call.amplitude = range(ranges[0]);
  call.phase = range(ranges[1]);
  call.x = range(ranges[2]);
  call.support_x = at<S>(places[0]);
  call.support_y = at<S>(places[1]);
  call.query_x = at<S>(places[2]);
  call.query_y = at<S>(places[3]);
  call.amplitudes = at<S>(places[4]);
  call.phases = at<S>(places[5]);
  py::gil_scoped_release release;
  ops_of<S>(where).sinusoids(call, at<tasks::DeviceStream>(stream), exec_of(where));
}

// (ways, shots, queries)
using Counts = std::array<index_t, 3>;
// (characters, drawings, channels, height, width)
using ImageSizes = std::array<index_t, 5>;

// `quarters` are the turns that make classes of a character; `places`: x and y of the support, x
// and y of the query, and room for the rows of all their images.
template <class S>
void few_shot(const LaunchPlace& where, Address stream, index_t tasks, const Counts& counts,
              Address data, const ImageSizes& sizes, const std::vector<int>& quarters, bool invert,
              bool channels_last, const std::array<Address, 5>& places) {
  require(0 < quarters.size() && quarters.size() <= 4, "quarters: expected 1 to 4 turns, got ",
          quarters.size());
  const auto [ways, shots, queries] = counts;
  tasks::Images images{
      at<const std::uint8_t>(data), sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  for (size_t i = 0; i < quarters.size(); ++i) images.quarters[i] = quarters[i];
  images.invert = invert;
  images.channels_last = channels_last;
  const index_t classes = images.characters * index_t(quarters.size());
  const tasks::Episodes call{{0, 0, tasks}, classes, images.drawings, ways, shots, queries};
  auto* const rows = at<std::int64_t>(places[4]);
  const index_t s = tasks * ways * shots, q = tasks * ways * queries;
  auto* const there = at<tasks::DeviceStream>(stream);
  const tasks::EpisodePlaces chosen{rows, rows + s, at<std::int64_t>(places[1]),
                                    at<std::int64_t>(places[3])};
  const tasks::ImagePlaces<S> gathered{rows,  s,    q, at<S>(places[0]), at<S>(places[2]),
                                       there, tasks};
  py::gil_scoped_release release;
  const tasks::SamplingOps<S> ops = ops_of<S>(where);
  ops.episodes(call, there, chosen, exec_of(where));
  ops.images(images, gathered, exec_of(where));
}

}  // namespace

void define_device_sampling(py::module_& m) {
  m.def("device_sinusoids_float32", &sinusoids<float>);
  m.def("device_sinusoids_float64", &sinusoids<double>);
  m.def("device_few_shot_float32", &few_shot<float>);
  m.def("device_few_shot_float64", &few_shot<double>);
}

}  // namespace fm::bind
