#include "cpu/tasks.h"

#include "cpu/parallel.h"

namespace fm::cpu {
namespace {

struct TaskLoop {
  void (*body)(void*, index_t, index_t, const Exec&);
  void* state;
};

}  // namespace

index_t task_slots(index_t tasks) { return min_of<index_t>(tasks, num_threads()); }

// Slots were counted when the call was planned; the number of threads may have changed since, but
// never do more threads than slots take tasks.
void for_each_task(index_t tasks, index_t slots, void (*body)(void*, index_t, index_t, const Exec&),
                   void* state) {
  TaskLoop loop{body, state};
  run_parts(
      tasks, int(slots),
      [](void* l, int thread, index_t task) {
        const TaskLoop& loop = *static_cast<const TaskLoop*>(l);
        loop.body(loop.state, thread, task, Exec{team_of(thread), nullptr});
      },
      &loop);
}

void for_each_range(index_t n, index_t grain, void (*body)(void*, index_t, index_t), void* state) {
  struct RangeLoop {
    index_t n, grain;
    void (*body)(void*, index_t, index_t);
    void* state;
  } loop{n, grain, body, state};
  const index_t parts = (n + grain - 1) / grain;
  if (parts <= 1) {
    if (n > 0) body(state, 0, n);
    return;
  }
  run_parts(
      parts, num_threads(),
      [](void* l, int, index_t part) {
        const RangeLoop& loop = *static_cast<const RangeLoop*>(l);
        const index_t begin = part * loop.grain;
        loop.body(loop.state, begin, min_of(loop.n, begin + loop.grain));
      },
      &loop);
}

}  // namespace fm::cpu
