// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", 2011; and the stream of random words that every task is made of.
//
// Word i of task t under a 64-bit key is word i % 4 of
//
//   philox4x32(counter = {i / 4, plane, t mod 2^32, t / 2^32}, key = {key mod 2^32, key / 2^32})
//
// with plane 0; plane 1 holds the lower bits of numbers of 53 bits. So a task depends on the key
// and its own number alone: not on the other tasks of its batch, nor on threads.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fm::tasks {

struct Words {
  std::uint32_t word[4];
};

FM_INLINE Words philox4x32(Words c, std::uint32_t k0, std::uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t(0xD2511F53u) * c.word[0];
    const std::uint64_t p1 = std::uint64_t(0xCD9E8D57u) * c.word[2];
    c = {{std::uint32_t(p1 >> 32) ^ c.word[1] ^ k0, std::uint32_t(p1),
          std::uint32_t(p0 >> 32) ^ c.word[3] ^ k1, std::uint32_t(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Words 0 .. count - 1 of a task, padded to whole blocks of four: `out` has room for those.
FM_INLINE void task_words(std::uint64_t key, std::uint64_t task, std::uint32_t plane, index_t count,
                          std::uint32_t* out) {
  for (index_t block = 0; block * 4 < count; ++block) {
    const Words w =
        philox4x32({{std::uint32_t(block), plane, std::uint32_t(task), std::uint32_t(task >> 32)}},
                   std::uint32_t(key), std::uint32_t(key >> 32));
    for (int i = 0; i < 4; ++i) out[block * 4 + i] = w.word[i];
  }
}

// Uniform in [0, 1): 24 bits of a word, and for double 29 more of the word in plane 1.
FM_INLINE float uniform(std::uint32_t high, std::uint32_t, float) {
  return float(high >> 8) * 0x1p-24f;
}
FM_INLINE double uniform(std::uint32_t high, std::uint32_t low, double) {
  return double(high >> 8) * 0x1p-24 + double(low >> 3) * 0x1p-53;
}

// Uniform in 0 .. n - 1, n < 2^32: each value has the probability 1 / n up to 2^-32.
FM_INLINE index_t below(std::uint32_t word, index_t n) {
  return index_t((std::uint64_t(word) * std::uint64_t(n)) >> 32);
}

}  // namespace fm::tasks
