// Batches of tasks made on the GPU, from the stream of tasks/philox.h: the words, and so the tasks,
// are those of tasks/sampling.h. All pointers are to device memory.
//
// Where a stream stands is device memory as well, which a draw reads and moves on. So a draw can be
// captured in a graph, and gives the tasks that follow whenever it is replayed. The stream is moved
// when nobody in a draw reads it any more.
//
// Knows nothing of launches, so that the binding can include it whatever it is compiled by.
#pragma once

#include <cstdint>

#include "program/backend.h"
#include "tasks/sampling.h"

namespace fm::tasks {

// Takes the place of key and first of a `Stream`.
struct DeviceStream {
  std::uint64_t key = 0, next = 0;    // number of the next task
  unsigned arrivals = 0, unused = 0;  // blocks of a draw that have read it; 0 between draws
};

// Rows and labels of episodes: support [T, ways, shots], query [T, ways, queries]. A row is
// class * drawings + drawing; labels may be null.
struct EpisodePlaces {
  std::int64_t *support = nullptr, *query = nullptr;
  std::int64_t *support_labels = nullptr, *query_labels = nullptr;
};

// Images [characters, drawings, channels, height, width], kept once however they are turned: class
// c of the episodes is character c % characters, turned by quarters[c / characters] quarter turns
// counter-clockwise, as torch.rot90 does. A quarter or three need height = width.
struct Images {
  const std::uint8_t* data = nullptr;
  index_t characters = 0, drawings = 0, channels = 1, height = 0, width = 0;
  int quarters[4] = {0, 0, 0, 0};
  bool invert = false;         // v becomes 255 - v
  bool channels_last = false;  // of what is written
};

// Where images go: those of the support's rows, then those of the query's.
template <class S>
struct ImagePlaces {
  const std::int64_t* rows = nullptr;  // [support + query]
  index_t support = 0, query = 0;
  S *support_x = nullptr, *query_x = nullptr;
  DeviceStream* stream = nullptr;  // moved past this many tasks; null: none
  index_t tasks = 0;
};

template <class S>
struct SamplingOps {
  // Key and first of the call's own stream are not read.
  void (*sinusoids)(const Sinusoids<S>&, DeviceStream*, const Exec&) = nullptr;
  // Leaves the stream where it is, to be moved by the images that follow.
  void (*episodes)(const Episodes&, const DeviceStream*, const EpisodePlaces&,
                   const Exec&) = nullptr;
  // out[i] = images[rows[i]] / 255, turned: [n, channels, height, width] or channels last.
  void (*images)(const Images&, const ImagePlaces<S>&, const Exec&) = nullptr;
};

}  // namespace fm::tasks

// `task_words` gives words 0 .. count - 1 of tasks first, first + 1, ...: [T, count]
#define FM_SAMPLING                                                                \
  template <class S>                                                               \
  tasks::SamplingOps<S> sampling_ops();                                            \
  void task_words(const tasks::Stream& stream, std::uint32_t plane, index_t count, \
                  std::uint32_t* words, const Exec& exec)

namespace fm::cuda {
FM_SAMPLING;
}  // namespace fm::cuda

namespace fm::cuda_emulated {
FM_SAMPLING;
}  // namespace fm::cuda_emulated

#undef FM_SAMPLING
