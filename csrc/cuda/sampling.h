// Batches of tasks made on the GPU, from the stream of tasks/philox.h: the words, and so the tasks,
// are those of tasks/sampling.h. All pointers are to device memory.
#pragma once

#include "cuda/launch.h"
#include "tasks/sampling.h"

namespace FM_CUDA {

// Words 0 .. count - 1 of tasks first, first + 1, ...: [T, count].
void task_words(const tasks::Stream& stream, std::uint32_t plane, index_t count,
                std::uint32_t* words, const Exec& exec);

template <class S>
void sample(const tasks::Sinusoids<S>& call, const Exec& exec);

// Rows and labels of episodes: support [T, ways, shots], query [T, ways, queries]. A row is
// class * drawings + drawing; labels may be null.
struct EpisodePlaces {
  std::int64_t *support = nullptr, *query = nullptr;
  std::int64_t *support_labels = nullptr, *query_labels = nullptr;
};
void sample(const tasks::Episodes& call, const EpisodePlaces& places, const Exec& exec);

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

// out[i] = images[rows[i]] / 255, turned: [n, channels, height, width] or channels last.
template <class S>
void gather_images(const Images& images, const std::int64_t* rows, index_t n, S* out,
                   const Exec& exec);

}  // namespace FM_CUDA
