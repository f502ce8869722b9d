// Which outputs of a ReLU are positive, one bit each: what its other passes want to know of it, in
// a 32nd of the bytes. [rows, sign_words] words of a task; column c is bit c % 32 of word c / 32.
//
// A kernel that computes a tile of outputs gathers their bits in shared memory, where lanes that
// hold eight columns of a row put a byte together, and then stores them by whole words. Bits beyond
// the columns are 0 or not written.
#pragma once

#include "cuda/bilinear_tile.cuh"

namespace FM_CUDA {

// Zero where the bit says so; the run's columns begin at `column`, a multiple of their number.
template <int N, class S>
FM_DEVICE void mask_by_signs(Run<N, S>& run, const unsigned* row, int column) {
  static_assert(32 % N == 0, "a run lies in one word");
  const unsigned bits = row[column / 32] >> (column % 32);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (!(bits >> i & 1u)) run.v[i] = S(0);
  }
}

template <int Rows, int Columns>
struct SignTile {
  static constexpr int kBytes = Columns / 8,
                       kUnit = Columns % 32 == 0 ? 4 : 1;  // of a row, a store
  static_assert(Columns % 8 == 0 && kBytes % kUnit == 0, "whole bytes of columns");
  using Unit = std::conditional_t<kUnit == 4, unsigned, unsigned char>;

  unsigned char* bytes;  // [Rows, kBytes], shared

  // By all lanes of a warp, of which 8 / N neighbours hold eight columns; `width` of a lane's
  // exist.
  template <int N, class S>
  FM_DEVICE void put(int row, int column, const Run<N, S>& run, int width) const {
    static_assert(8 % N == 0, "lanes share a byte");
    unsigned byte = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      byte |= unsigned(i < width && run.v[i] > S(0)) << (column % 8 + i);
    }
#pragma unroll
    for (int distance = 4 / N; distance > 0; distance /= 2) {
      byte |= warp_shuffle_xor(byte, distance);
    }
    if (column % 8 == 0) bytes[row * kBytes + column / 8] = static_cast<unsigned char>(byte);
  }

  // Rows go where `targets` says (< 0: nowhere), into `words` words each, from column `first` on.
  FM_DEVICE void store(unsigned* signs, const int* targets, int words, int first) const {
    constexpr int kUnits = kBytes / kUnit;
    for (int i = int(threadIdx.x); i < Rows * kUnits; i += kProductThreads) {
      const int row = i / kUnits, byte = i % kUnits * kUnit, at = first / 8 + byte;
      if (targets[row] < 0 || at >= 4 * words) continue;
      unsigned char* to = reinterpret_cast<unsigned char*>(signs + targets[row] * words) + at;
      *reinterpret_cast<Unit*>(to) = *reinterpret_cast<const Unit*>(bytes + row * kBytes + byte);
    }
  }
};

}  // namespace FM_CUDA
