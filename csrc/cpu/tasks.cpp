#include "cpu/tasks.h"

#include "cpu/parallel.h"

namespace fm::cpu {
namespace {

struct TaskLoop {
  TaskBody body;
  void* state;
};

}  // namespace

index_t task_slots(index_t tasks) { return min_of<index_t>(tasks, num_threads()); }

// Slots were counted when the call was planned; the number of threads may have changed since, but
// never do more threads than slots take tasks.
void for_each_task(index_t tasks, index_t slots, const Exec&, TaskBody body, void* state) {
  TaskLoop loop{body, state};
  run_parts(
      tasks, int(slots),
      [](void* l, int thread, index_t task) {
        const TaskLoop& loop = *static_cast<const TaskLoop*>(l);
        Exec exec;
        exec.context = team_of(thread);
        loop.body(loop.state, thread, task, 1, exec);
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

index_t one_slot(index_t) { return 1; }

// A call of the pool all the same, for what it does to denormals.
void all_tasks(index_t tasks, index_t, const Exec&, TaskBody body, void* state) {
  struct All {
    TaskBody body;
    void* state;
    index_t tasks;
  } all{body, state, tasks};
  run_parts(
      1, 1,
      [](void* a, int, index_t) {
        const All& all = *static_cast<const All*>(a);
        all.body(all.state, 0, 0, all.tasks, Exec{});
      },
      &all);
}

void whole_range(index_t n, index_t, void (*body)(void*, index_t, index_t), void* state) {
  if (n > 0) body(state, 0, n);
}

}  // namespace fm::cpu
