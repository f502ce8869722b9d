#include "tasks/sampling.h"

#include <cmath>
#include <vector>

#include "math/sine.h"
#include "tasks/philox.h"

namespace fm::tasks {
namespace {

constexpr index_t padded(index_t words) { return (words + 3) / 4 * 4; }

template <class S>
struct Uniform {
  S low, width;
  explicit Uniform(const Range& r) : low(S(r.low)), width(S(r.high - r.low)) {}
  S operator()(std::uint32_t high_word, std::uint32_t low_word) const {
    return low + uniform(high_word, low_word, S()) * width;
  }
};

double largest(const Range& r) { return std::fmax(std::fabs(r.low), std::fabs(r.high)); }

// Picks `count` distinct numbers below n. `taken` is scratch for the picks in ascending order.
template <class Take>
void pick_distinct(const std::uint32_t* words, index_t n, index_t count, index_t* taken,
                   Take&& take) {
  for (index_t i = 0; i < count; ++i) {
    index_t pick = below(words[i], n - i), place = 0;
    while (place < i && taken[place] <= pick) {
      ++pick;
      ++place;
    }
    for (index_t j = i; j > place; --j) taken[j] = taken[j - 1];
    taken[place] = pick;
    take(i, pick);
  }
}

}  // namespace

template <class S>
void sample(const Sinusoids<S>& c) {
  const index_t count = 2 + c.support + c.queries;
  std::vector<std::uint32_t> words(2 * padded(count));
  std::uint32_t *high = words.data(), *low = high + padded(count);
  const Uniform<S> amplitude(c.amplitude), phase(c.phase), x(c.x);
  const bool moderate = sizeof(S) == 4 && largest(c.x) + largest(c.phase) < math::kSineRange;
  for (index_t t = 0; t < c.stream.tasks; ++t) {
    const std::uint64_t task = c.stream.first + std::uint64_t(t);
    task_words(c.stream.key, task, 0, count, high);
    if constexpr (sizeof(S) == 8) task_words(c.stream.key, task, 1, count, low);
    const S a = amplitude(high[0], low[0]), shift = phase(high[1], low[1]);
    if (c.amplitudes) c.amplitudes[t] = a;
    if (c.phases) c.phases[t] = shift;
    const auto wave = [&](index_t first, index_t n, S* xs, S* ys) {
      for (index_t i = 0; i < n; ++i) xs[i] = x(high[first + i], low[first + i]);
      if (moderate) {
        for (index_t i = 0; i < n; ++i) ys[i] = a * S(math::moderate_sine(double(xs[i] - shift)));
      } else {
        for (index_t i = 0; i < n; ++i) ys[i] = a * std::sin(xs[i] - shift);
      }
    };
    wave(2, c.support, c.support_x + t * c.support, c.support_y + t * c.support);
    wave(2 + c.support, c.queries, c.query_x + t * c.queries, c.query_y + t * c.queries);
  }
}

void sample(const Episodes& c, std::int64_t* support, std::int64_t* query) {
  const index_t each = c.shots + c.queries, count = c.ways * (1 + each);
  std::vector<std::uint32_t> words(padded(count));
  std::vector<index_t> classes(c.ways), taken(c.ways > each ? c.ways : each);
  for (index_t t = 0; t < c.stream.tasks; ++t) {
    task_words(c.stream.key, c.stream.first + std::uint64_t(t), 0, count, words.data());
    pick_distinct(words.data(), c.classes, c.ways, taken.data(),
                  [&](index_t way, index_t pick) { classes[way] = pick; });
    for (index_t way = 0; way < c.ways; ++way) {
      std::int64_t* s = support + (t * c.ways + way) * c.shots;
      std::int64_t* q = query + (t * c.ways + way) * c.queries;
      pick_distinct(words.data() + c.ways + way * each, c.drawings, each, taken.data(),
                    [&](index_t i, index_t pick) {
                      const index_t row = classes[way] * c.drawings + pick;
                      (i < c.shots ? s[i] : q[i - c.shots]) = row;
                    });
    }
  }
}

void write_labels(index_t tasks, index_t ways, index_t repeats, std::int64_t* labels) {
  for (index_t t = 0; t < tasks; ++t) {
    for (index_t way = 0; way < ways; ++way) {
      for (index_t i = 0; i < repeats; ++i) *labels++ = way;
    }
  }
}

template <class S>
void gather_images(const std::uint8_t* images, index_t pixels, const std::int64_t* rows,
                   index_t begin, index_t end, S* out) {
  for (index_t i = begin; i < end; ++i) {
    const std::uint8_t* FM_RESTRICT from = images + rows[i] * pixels;
    S* FM_RESTRICT to = out + i * pixels;
    for (index_t p = 0; p < pixels; ++p) to[p] = S(from[p]) / S(255);
  }
}

template void sample(const Sinusoids<float>&);
template void sample(const Sinusoids<double>&);
template void gather_images(const std::uint8_t*, index_t, const std::int64_t*, index_t, index_t,
                            float*);
template void gather_images(const std::uint8_t*, index_t, const std::int64_t*, index_t, index_t,
                            double*);

}  // namespace fm::tasks
