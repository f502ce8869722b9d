// The sum of rows over tasks, by a tree, while tasks are still running: node i at height h has
// those from i 2^h on below it, and leaves their sum in the first.
//
// Whoever is done with the second half of a node adds up both, so that rows mostly stay in the
// caches of the thread that wrote them. A sum at the end would read all rows, half of them from the
// other thread's caches, and the next call would have to take them back to write them. Which rows
// are added to which depends on the number of tasks alone.

namespace FM_KERNELS {

class RowTree {
 public:
  explicit RowTree(void* memory) : arrivals_(static_cast<Arrivals*>(memory)) {}

  static index_t bytes(index_t tasks) { return tasks * index_t(sizeof(Arrivals)); }

  void clear(index_t tasks) {
    for (index_t i = 0; i < tasks; ++i) new (arrivals_ + i) Arrivals;
  }

  // Row `task` is finished. A node is known by the first task of its second half.
  void arrive(S* rows, index_t tasks, index_t count, index_t task) {
    for (index_t half = 1; half < tasks; half *= 2) {
      const index_t first = task / (2 * half) * (2 * half), second = first + half;
      if (second >= tasks) continue;  // no second half
      if (arrivals_[second].count.fetch_add(1, std::memory_order_acq_rel) == 0) return;
      S* FM_RESTRICT to = rows + first * count;
      const S* FM_RESTRICT from = rows + second * count;
      for (index_t i = 0; i < count; ++i) to[i] += from[i];
    }
  }

 private:
  struct alignas(kAlignment) Arrivals {  // a cache line each
    std::atomic<int> count{0};
  };
  Arrivals* arrivals_;
};

}  // namespace FM_KERNELS
