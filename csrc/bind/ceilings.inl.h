// The loops of ceilings.cpp, once per instruction set: FM_CEILING_NAME, FM_CEILING_TARGET (an
// attribute), FM_CEILING_BYTES of a vector, FM_CEILING_CHAINS that hide a multiply-add's latency
// and fit the registers.

namespace fm::FM_CEILING_NAME {

typedef float V __attribute__((vector_size(FM_CEILING_BYTES), may_alias));
constexpr index_t kLanes = FM_CEILING_BYTES / sizeof(float);
constexpr int kChains = FM_CEILING_CHAINS;

// Returns the operations done: a multiply-add is two.
FM_CEILING_TARGET inline double multiply_adds(index_t rounds) {
  V factor = V{} + 0.999999f, term = V{} + 1e-6f;
  asm volatile("" : "+m"(factor), "+m"(term));  // unknown to the compiler, so nothing folds
  const V a = factor, b = term;
  V chain[kChains];
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) chain[i] = b * float(i + 1);  // equal ones would be one
  for (index_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * a + b;
  }
  V sum{};
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) sum += chain[i];
  ceiling_sink = sum[0];
  return 2.0 * double(rounds) * kChains * double(kLanes);
}

FM_CEILING_TARGET inline void read_stream(const float* x, float*, index_t n) {
  V sum[8] = {};
  for (index_t i = 0; i + 8 * kLanes <= n; i += 8 * kLanes) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] += *reinterpret_cast<const V*>(x + i + j * kLanes);
  }
  V total{};
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) total += sum[j];
  ceiling_sink = total[0];
}

FM_CEILING_TARGET inline void write_stream(const float*, float* y, index_t n) {
  const V one = V{} + 1.0f;
  for (index_t i = 0; i + 4 * kLanes <= n; i += 4 * kLanes) {
    asm volatile("" ::: "memory");  // stays a loop of stores, not a call of memset
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) *reinterpret_cast<V*>(y + i + j * kLanes) = one;
  }
}

FM_CEILING_TARGET inline void copy_stream(const float* x, float* y, index_t n) {
  for (index_t i = 0; i + 4 * kLanes <= n; i += 4 * kLanes) {
    V v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) v[j] = *reinterpret_cast<const V*>(x + i + j * kLanes) + 1.0f;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) *reinterpret_cast<V*>(y + i + j * kLanes) = v[j];
  }
}

}  // namespace fm::FM_CEILING_NAME

#undef FM_CEILING_NAME
#undef FM_CEILING_TARGET
#undef FM_CEILING_BYTES
#undef FM_CEILING_CHAINS
