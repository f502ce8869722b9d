// Batches of tasks from a counter-based stream: see philox.h for which word is which.
#pragma once

#include "common/types.h"

namespace fm::tasks {

// Tasks first, first + 1, ... of the stream of a key.
struct Stream {
  std::uint64_t key = 0, first = 0;
  index_t tasks = 0;
};

struct Range {
  double low = 0, high = 1;
};

// Waves y = A sin(x - phase). Words of a task: A, phase, then x of the support and the query.
template <class S>
struct Sinusoids {
  Stream stream;
  index_t support = 0, queries = 0;
  Range amplitude, phase, x;
  S *support_x = nullptr, *support_y = nullptr;  // [T, S]
  S *query_x = nullptr, *query_y = nullptr;      // [T, Q]
  S *amplitudes = nullptr, *phases = nullptr;    // [T], or null
};

template <class S>
void sample(const Sinusoids<S>& call);

// Few-shot episodes out of images [classes, drawings, pixels]. Words of a task: one for each of
// its classes, then for class after class one for each of its drawings, support first. Word i of
// a selection of distinct numbers below n picks, in ascending order, number below(word, n - i) of
// those that are left; so all ordered selections are equally likely.
struct Episodes {
  Stream stream;
  index_t classes = 0, drawings = 0, ways = 0, shots = 0, queries = 0;
};

// Rows of the images, class * drawings + drawing: support [T, ways, shots], query [T, ways,
// queries].
void sample(const Episodes& call, std::int64_t* support, std::int64_t* query);

// Labels 0 .. ways - 1, each `repeats` times: [T, ways, repeats].
void write_labels(index_t tasks, index_t ways, index_t repeats, std::int64_t* labels);

// Images begin .. end - 1 of a batch as numbers in [0, 1]: out[i] = images[rows[i]] / 255.
template <class S>
void gather_images(const std::uint8_t* images, index_t pixels, const std::int64_t* rows,
                   index_t begin, index_t end, S* out);

}  // namespace fm::tasks
