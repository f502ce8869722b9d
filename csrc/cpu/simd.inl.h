// One vector of scalars S, as wide as the target's registers, over compiler vector extensions.
//
// Kernel files (*.inl.h) are compiled once per instruction set and scalar type, each time inside
// the namespace FM_KERNELS of that target: two targets that shared a symbol would be merged by the
// linker, and the plain one would run the other's instructions.

#if defined(__AVX512F__)
#define FM_VECTOR_BYTES 64
#elif defined(__AVX__)
#define FM_VECTOR_BYTES 32
#else
#define FM_VECTOR_BYTES 16
#endif

namespace FM_KERNELS {

using S = FM_SCALAR;
typedef S V __attribute__((vector_size(FM_VECTOR_BYTES)));
typedef S Unaligned __attribute__((vector_size(FM_VECTOR_BYTES), aligned(sizeof(S)), may_alias));
using Int = std::conditional_t<sizeof(S) == 4, std::int32_t, std::int64_t>;
typedef Int VI __attribute__((vector_size(FM_VECTOR_BYTES)));
typedef Int UnalignedInt
    __attribute__((vector_size(FM_VECTOR_BYTES), aligned(sizeof(Int)), may_alias));

constexpr index_t kLanes = FM_VECTOR_BYTES / sizeof(S);

// x - 0 is x, also for -0 and NaN, and compiles to a broadcast; 0 + x would not.
FM_INLINE V splat(S value) { return value - V{}; }
FM_INLINE V load(const S* p) { return *reinterpret_cast<const Unaligned*>(p); }
FM_INLINE void store(S* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }

// The first n < kLanes elements; the others are zero, and are not touched in memory.
#if defined(__AVX512F__)
FM_INLINE V load_first(const S* p, index_t n) {
  const unsigned mask = (1u << n) - 1u;
  if constexpr (sizeof(S) == 4) {
    return V(_mm512_maskz_loadu_ps(__mmask16(mask), p));
  } else {
    return V(_mm512_maskz_loadu_pd(__mmask8(mask), p));
  }
}
FM_INLINE void store_first(S* p, V v, index_t n) {
  const unsigned mask = (1u << n) - 1u;
  if constexpr (sizeof(S) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16(mask), __m512(v));
  } else {
    _mm512_mask_storeu_pd(p, __mmask8(mask), __m512d(v));
  }
}
#else
FM_INLINE V load_first(const S* p, index_t n) {
  V v{};
  for (index_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
FM_INLINE void store_first(S* p, V v, index_t n) {
  for (index_t i = 0; i < n; ++i) p[i] = v[i];
}
#endif

// Loads and stores of a whole vector, or of its first n elements: kernels are written once and
// instantiated for both.
template <bool Partial>
struct Lanes {
  index_t n;
  FM_INLINE V get(const S* p) const {
    if constexpr (Partial) return load_first(p, n);
    return load(p);
  }
  FM_INLINE void put(S* p, V v) const {
    if constexpr (Partial) {
      store_first(p, v, n);
    } else {
      store(p, v);
    }
  }
};

// Calls body(lanes, column) for every vector of a row of `columns` elements.
template <class Body>
FM_INLINE void for_columns(index_t columns, Body&& body) {
  index_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) body(Lanes<false>{kLanes}, c);
  if (c < columns) body(Lanes<true>{columns - c}, c);
}

FM_INLINE V select(VI mask, V a, V b) { return mask ? a : b; }

// Work, in multiply-adds, worth handing to another thread: a microsecond or two, against the half
// of one that it takes until that thread has it.
constexpr index_t kWorthSharing = 65536;

// Splits [0, n) into ranges of multiples of `grain` and runs body(begin, end) on each: on this
// thread, or on the team of `exec`. `work`: of one element; a guess will do.
template <class Body>
inline void parallel(const Exec& exec, index_t n, index_t grain, index_t work, Body&& body) {
  index_t parts = 1;
  if (exec.context && n > grain && n * work > kWorthSharing) {
    const int team = team_size(exec.context);
    const index_t least = align_up(max_of<index_t>(1, kWorthSharing / work), grain);
    parts = team == 1 ? 1 : min_of<index_t>((n + least - 1) / least, 2 * team);
  }
  if (parts == 1) {
    body(index_t(0), n);
    return;
  }
  const index_t blocks = (n + grain - 1) / grain;
  struct Call {
    std::remove_reference_t<Body>* body;
    index_t n, grain, blocks, parts;
  } call{&body, n, grain, blocks, parts};
  const auto run = [](void* state, int, index_t part) {
    const Call& c = *static_cast<const Call*>(state);
    const index_t begin = c.blocks * part / c.parts * c.grain;
    const index_t end = min_of(c.n, c.blocks * (part + 1) / c.parts * c.grain);
    if (begin < end) (*c.body)(begin, end);
  };
  team_parts(exec.context, parts, run, &call);
}

}  // namespace FM_KERNELS
