// Tiles: asynchronous copies into shared memory, and products of fragments on tensor cores.
//
//   copy_async<4|8|16>(shared, global, valid)   zero-fills where not valid; 16 bytes skip L1
//   copy_async_commit(), copy_async_wait<N>()   until all but the N last groups of this thread are
//                                               there; a barrier shows them to other threads
//   mma_tf32(d, a, b)   d[16, 8] += a[16, 8] b[8, 8]     one fragment per lane of a full warp
//   mma_bf16(d, a, b)   d[16, 8] += a[16, 16] b[16, 8]
//
// With g = lane / 4 and t = lane % 4 a lane holds (PTX ISA, "Matrix Fragments for mma")
//
//   tf32   a[0..3] = A[g, t], A[g+8, t], A[g, t+4], A[g+8, t+4]     b[0..1] = B[t, g], B[t+4, g]
//   bf16   a[0..3] = A[g, 2t..], A[g+8, 2t..], A[g, 2t+8..], A[g+8, 2t+8..]   pairs, lower k in the
//          b[0..1] = B[2t.., g], B[2t+8.., g]                                 lower half
//   both   d[0..3] = D[g, 2t], D[g, 2t+1], D[g+8, 2t], D[g+8, 2t+1]
//
// TF32 keeps 10 bits of the fraction. With x = big + small, a product of two floats is
// big*big + big*small + small*big up to about 2^-22: three TF32 products, 3xTF32.
#pragma once

#include "cuda/launch.h"

namespace FM_CUDA {

#if defined(__CUDACC__)

template <int Bytes>
FM_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "what the hardware copies");
  const unsigned target = unsigned(__cvta_generic_to_shared(shared));
  const int bytes = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global),
                 "n"(Bytes), "r"(bytes)
                 : "memory");
  }
}

FM_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int Groups>
FM_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

FM_DEVICE unsigned to_tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Two bfloat16, `low` in the lower half.
FM_DEVICE unsigned pack_bf16(float low, float high) {
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

FM_DEVICE float as_float(unsigned bits) { return __uint_as_float(bits); }

FM_DEVICE void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

FM_DEVICE void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

template <int Bytes>
void copy_async(void* shared, const void* global, bool valid, FM_PLACE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "what the hardware copies");
  copy_issue(shared, global, Bytes, valid, {"copy_async", file, line});
}

inline void copy_async_commit() { copy_commit(); }

template <int Groups>
void copy_async_wait() {
  copy_wait(Groups);
}

inline unsigned as_bits(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// To nearest, ties away from zero; an infinity and a NaN stay what they are.
inline unsigned to_tf32(float x) {
  const unsigned bits = as_bits(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return x != x ? 0x7fffe000u : bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

// To nearest, ties to even.
inline unsigned to_bf16(float x) {
  const unsigned bits = as_bits(x);
  if (x != x) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline unsigned pack_bf16(float low, float high) { return to_bf16(high) << 16 | to_bf16(low); }

struct Fragments {
  unsigned a[4], b[2];
};

// The running lane's four sums, out of all lanes' fragments. `element(word, i)` is number i of the
// numbers in a fragment's word. Rounded once, where tensor cores round more often.
template <int PerWord, class Element>
void mma_product(float (&d)[4], const Fragments& mine, Element&& element, Place place) {
  constexpr unsigned half = 4 * PerWord;  // columns of A in one word of four lanes
  const unsigned char* all = exchange(&mine, sizeof mine, place);
  const unsigned g = context.thread.x % 32 / 4, t = context.thread.x % 4;
  double a[2][2 * half], b[2][2 * half];  // rows g and g + 8 of A, columns 2t and 2t + 1 of B
  for (unsigned l = 0; l < 4; ++l) {
    Fragments row, columns[2];
    std::memcpy(&row, all + (4 * g + l) * kSlot, sizeof row);
    std::memcpy(&columns[0], all + (8 * t + l) * kSlot, sizeof row);
    std::memcpy(&columns[1], all + (8 * t + 4 + l) * kSlot, sizeof row);
    for (unsigned i = 0; i < PerWord; ++i) {
      for (unsigned h = 0; h < 2; ++h) {
        const unsigned k = h * half + l * PerWord + i;
        for (unsigned j = 0; j < 2; ++j) {
          a[j][k] = double(element(row.a[2 * h + j], i));
          b[j][k] = double(element(columns[j].b[h], i));
        }
      }
    }
  }
  for (unsigned i = 0; i < 4; ++i) {
    double sum = double(d[i]);
    for (unsigned k = 0; k < 2 * half; ++k) sum += a[i / 2][k] * b[i % 2][k];
    d[i] = float(sum);
  }
}

// Tensor cores cut operands off to tf32, they don't round them.
inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], FM_PLACE) {
  mma_product<1>(d, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}},
                 [](unsigned word, unsigned) { return as_float(word & ~0x1fffu); },
                 {"mma_tf32", file, line});
}

inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], FM_PLACE) {
  mma_product<2>(
      d, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}},
      [](unsigned word, unsigned i) { return as_float(i == 0 ? word << 16 : word & 0xffff0000u); },
      {"mma_bf16", file, line});
}

#endif

FM_DEVICE void split_tf32(float x, unsigned& big, unsigned& small) {
  big = to_tf32(x);
  small = to_tf32(x - as_float(big));
}

}  // namespace FM_CUDA
