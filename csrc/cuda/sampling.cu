// Tasks from the counter-based stream of tasks/philox.h, word for word those of tasks/sampling.cpp.
//
// A number of a task hangs on its own word alone, so a thread makes a sample: it runs the generator
// for its word (and for the wave's amplitude and phase), instead of passing words through memory.
// Distinct picks hang on the picks before them: a block takes an episode, its first thread picks
// the classes, then a thread picks the drawings of a class. Shared memory holds the picks in
// ascending order, in 32 bits. Images stay uint8 and unturned; a gather turns, inverts and scales
// them. The stream is moved on by the gather, which doesn't read it, and by the last block of waves
// to have read it.
#include "cuda/sampling.h"

#include <cmath>

#include "cuda/launch.h"
#include "cuda/pack.cuh"
#include "math/sine.h"
#include "tasks/philox.h"

namespace FM_CUDA {
namespace {

FM_DEVICE std::uint32_t word_of(std::uint64_t key, std::uint64_t task, std::uint32_t plane,
                                std::uint32_t i) {
  const tasks::Words w =
      tasks::philox4x32({{i / 4, plane, std::uint32_t(task), std::uint32_t(task >> 32)}},
                        std::uint32_t(key), std::uint32_t(key >> 32));
  return i % 4 == 0 ? w.word[0] : i % 4 == 1 ? w.word[1] : i % 4 == 2 ? w.word[2] : w.word[3];
}

struct WordParams {
  std::uint64_t key, first;
  std::uint32_t plane, count, items;
  std::uint32_t* words;
};

FM_KERNEL void task_words_kernel(const WordParams p) {
  await_previous_kernels();
  const std::uint32_t item = blockIdx.x * blockDim.x + threadIdx.x;
  if (item >= p.items) return;
  p.words[item] = word_of(p.key, p.first + item / p.count, p.plane, item % p.count);
}

// Behind a block's reads of the stream, by all its threads: the last block moves it on.
FM_DEVICE void leave_stream(tasks::DeviceStream* stream, std::uint64_t tasks) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();  // read before it is said to be
  if (atomicAdd(&stream->arrivals, 1u) + 1 != gridDim.x) return;
  __threadfence();
  stream->next += tasks;
  stream->arrivals = 0;
}

// -- waves ----------------------------------------------------------------------------------------

template <class S>
struct Uniform {
  S low, width;
};

template <class S>
struct SinusoidParams {
  tasks::DeviceStream* stream;
  std::uint32_t tasks, support, queries, items;  // items: T (S + Q)
  Uniform<S> amplitude, phase, x;
  bool moderate;
  S *support_x, *support_y, *query_x, *query_y, *amplitudes, *phases;
};

template <class S>
FM_DEVICE S number(std::uint64_t key, std::uint64_t task, std::uint32_t i,
                   const Uniform<S>& range) {
  const std::uint32_t high = word_of(key, task, 0, i);
  const std::uint32_t low = sizeof(S) == 8 ? word_of(key, task, 1, i) : 0;
  return range.low + tasks::uniform(high, low, S()) * range.width;
}

template <class S>
FM_KERNEL void sinusoid_kernel(const SinusoidParams<S> p) {
  await_previous_kernels();
  const std::uint32_t item = blockIdx.x * blockDim.x + threadIdx.x;
  const std::uint32_t each = p.support + p.queries, t = item / each, i = item % each;
  const std::uint64_t key = p.stream->key, task = p.stream->next + t;
  leave_stream(p.stream, p.tasks);
  if (item >= p.items) return;
  const S a = number(key, task, 0, p.amplitude), shift = number(key, task, 1, p.phase);
  const S x = number(key, task, 2 + i, p.x);
  S y;
  if (p.moderate) {
    y = a * S(math::moderate_sine(double(x - shift)));
  } else {
    y = a * std::sin(x - shift);
  }
  const bool query = i >= p.support;
  const index_t place =
      query ? index_t(t) * p.queries + (i - p.support) : index_t(t) * p.support + i;
  (query ? p.query_x : p.support_x)[place] = x;
  (query ? p.query_y : p.support_y)[place] = y;
  if (i > 0) return;
  if (p.amplitudes) p.amplitudes[t] = a;
  if (p.phases) p.phases[t] = shift;
}

// -- episodes -------------------------------------------------------------------------------------

struct EpisodeParams {
  const tasks::DeviceStream* stream;
  std::uint32_t classes, drawings;
  int ways, shots, queries;
  tasks::EpisodePlaces places;
};

// Pick i of distinct numbers below n: number below(word, n - i) of those left, in ascending order.
// `taken` holds the picks so far in ascending order.
FM_DEVICE std::uint32_t pick_distinct(std::uint32_t word, std::uint32_t n, int i,
                                      std::uint32_t* taken) {
  std::uint32_t pick = std::uint32_t(tasks::below(word, index_t(n) - i));
  int place = 0;
  while (place < i && taken[place] <= pick) {
    ++pick;
    ++place;
  }
  for (int j = i; j > place; --j) taken[j] = taken[j - 1];
  taken[place] = pick;
  return pick;
}

FM_KERNEL void episode_kernel(const EpisodeParams p) {
  await_previous_kernels();
  const int each = p.shots + p.queries, thread = int(threadIdx.x);
  std::uint32_t* classes = shared_memory<std::uint32_t>();  // [ways] as picked
  std::uint32_t* sorted = classes + p.ways;                 // [ways]
  std::uint32_t* taken = sorted + p.ways + thread * each;   // [threads, each]
  const std::uint64_t key = p.stream->key, task = p.stream->next + blockIdx.x;
  if (thread == 0) {
    for (int way = 0; way < p.ways; ++way) {
      const std::uint32_t word = word_of(key, task, 0, std::uint32_t(way));
      classes[way] = pick_distinct(word, p.classes, way, sorted);
    }
  }
  __syncthreads();
  for (int way = thread; way < p.ways; way += int(blockDim.x)) {
    const index_t place = index_t(blockIdx.x) * p.ways + way;
    for (int i = 0; i < each; ++i) {
      const std::uint32_t word = word_of(key, task, 0, std::uint32_t(p.ways + way * each + i));
      const index_t row =
          index_t(classes[way]) * p.drawings + pick_distinct(word, p.drawings, i, taken);
      const bool query = i >= p.shots;
      const index_t at = query ? place * p.queries + (i - p.shots) : place * p.shots + i;
      (query ? p.places.query : p.places.support)[at] = row;
      std::int64_t* labels = query ? p.places.query_labels : p.places.support_labels;
      if (labels) labels[at] = way;
    }
  }
}

// -- images ---------------------------------------------------------------------------------------

template <class S>
struct GatherParams {
  tasks::Images images;
  tasks::ImagePlaces<S> places;
  unsigned tiles;  // blocks an image
};

// Offset of the pixel that a turn brings to (h, w).
FM_DEVICE index_t turned(const tasks::Images& m, int quarter, int h, int w) {
  const int bottom = int(m.height) - 1, right = int(m.width) - 1;
  if (quarter == 1) return index_t(w) * m.width + (right - h);
  if (quarter == 2) return index_t(bottom - h) * m.width + (right - w);
  if (quarter == 3) return index_t(bottom - w) * m.width + h;
  return index_t(h) * m.width + w;
}

template <class S>
FM_KERNEL void gather_images_kernel(const GatherParams<S> p) {
  await_previous_kernels();
  const tasks::Images& m = p.images;
  if (p.places.stream && blockIdx.x == 0 && threadIdx.x == 0) {
    p.places.stream->next += std::uint64_t(p.places.tasks);
  }
  const int pixels = int(m.height * m.width), size = pixels * int(m.channels);
  const int e = int(blockIdx.x % p.tiles * blockDim.x + threadIdx.x);
  if (e >= size) return;
  const index_t i = blockIdx.x / p.tiles, row = p.places.rows[i];
  const index_t kind = row / m.drawings;
  const index_t image = kind % m.characters * m.drawings + row % m.drawings;
  const int turn = int(kind / m.characters);  // parameters are not indexed by numbers unknown
  const int quarter = turn == 0   ? m.quarters[0]
                      : turn == 1 ? m.quarters[1]
                      : turn == 2 ? m.quarters[2]
                                  : m.quarters[3];
  const int channel = m.channels_last ? e % int(m.channels) : e / pixels;
  const int pixel = m.channels_last ? e / int(m.channels) : e % pixels;
  const index_t from =
      turned(m, quarter, pixel / int(m.width), pixel % int(m.width)) + index_t(channel) * pixels;
  const std::uint8_t v = m.data[image * size + from];
  const index_t query = i - p.places.support;
  S* out = query < 0 ? p.places.support_x + i * size : p.places.query_x + query * size;
  out[e] = S(m.invert ? std::uint8_t(255 - v) : v) / S(255);
}

// As on the CPU: arguments whose sine moderate_sine knows to float's rounding.
double largest(const tasks::Range& r) { return std::fmax(std::fabs(r.low), std::fabs(r.high)); }

template <class S>
Uniform<S> uniform_of(const tasks::Range& r) {
  return {S(r.low), S(r.high - r.low)};
}

template <class S>
void sinusoids(const tasks::Sinusoids<S>& c, tasks::DeviceStream* stream, const Exec& exec) {
  const index_t items = c.stream.tasks * (c.support + c.queries);
  if (items == 0) return;
  const bool moderate = sizeof(S) == 4 && largest(c.x) + largest(c.phase) < math::kSineRange;
  const SinusoidParams<S> p{stream,
                            std::uint32_t(c.stream.tasks),
                            std::uint32_t(c.support),
                            std::uint32_t(c.queries),
                            std::uint32_t(items),
                            uniform_of<S>(c.amplitude),
                            uniform_of<S>(c.phase),
                            uniform_of<S>(c.x),
                            moderate,
                            c.support_x,
                            c.support_y,
                            c.query_x,
                            c.query_y,
                            c.amplitudes,
                            c.phases};
  launch(sinusoid_kernel<S>, flat_blocks(items, "waves"), kThreads, 0, exec, p);
}

void episodes(const tasks::Episodes& c, const tasks::DeviceStream* stream,
              const tasks::EpisodePlaces& places, const Exec& exec) {
  if (c.stream.tasks == 0) return;
  require(0 < c.ways && c.ways <= c.classes, "ways: expected 1 to ", c.classes, ", got ", c.ways);
  require(0 <= c.shots && 0 <= c.queries && c.shots + c.queries <= c.drawings,
          "shots + queries: expected at most ", c.drawings, ", got ", c.shots, " + ", c.queries);
  require(c.classes * c.drawings < (index_t(1) << 32), "images: expected fewer than 2^32, got ",
          c.classes, " classes of ", c.drawings);
  const index_t each = c.shots + c.queries;
  // as many threads as ways, as far as their picks fit into shared memory
  constexpr index_t kSharedWords = 12 << 10;
  require(2 * c.ways + index_t(kWarp) * each <= kSharedWords,
          "ways, shots and queries: expected 2 ", "ways + 32 (shots + queries) to be at most ",
          kSharedWords, ", got ", c.ways, " ways and ", each, " images of a class");
  unsigned threads = kWarp;
  while (threads < kThreads && threads < c.ways &&
         2 * c.ways + 2 * index_t(threads) * each <= kSharedWords) {
    threads *= 2;
  }
  const EpisodeParams p{stream,
                        std::uint32_t(c.classes),
                        std::uint32_t(c.drawings),
                        int(c.ways),
                        int(c.shots),
                        int(c.queries),
                        places};
  launch(episode_kernel, unsigned(c.stream.tasks), threads,
         (2 * c.ways + threads * each) * sizeof(std::uint32_t), exec, p);
}

template <class S>
void gather_images(const tasks::Images& images, const tasks::ImagePlaces<S>& places,
                   const Exec& exec) {
  const index_t size = images.channels * images.height * images.width;
  const index_t tiles = divide_up(size, kThreads), n = places.support + places.query;
  require(n * tiles < (index_t(1) << 31), "images: expected fewer than 2^31 blocks, got ", n,
          " images");
  for (int quarter : images.quarters) {
    require(quarter % 2 == 0 || images.height == images.width,
            "rotations by 90 or 270 need square images, got ", images.height, " x ", images.width);
  }
  if (n == 0) return;
  launch(gather_images_kernel<S>, unsigned(n * tiles), kThreads, 0, exec,
         GatherParams<S>{images, places, unsigned(tiles)});
}

}  // namespace

void task_words(const tasks::Stream& stream, std::uint32_t plane, index_t count,
                std::uint32_t* words, const Exec& exec) {
  const index_t items = stream.tasks * count;
  if (items == 0) return;
  const WordParams p{stream.key,           stream.first,         plane,
                     std::uint32_t(count), std::uint32_t(items), words};
  launch(task_words_kernel, flat_blocks(items, "random words"), kThreads, 0, exec, p);
}

template <class S>
tasks::SamplingOps<S> sampling_ops() {
  return {sinusoids<S>, episodes, gather_images<S>};
}

template tasks::SamplingOps<float> sampling_ops();
template tasks::SamplingOps<double> sampling_ops();

}  // namespace FM_CUDA
