// How the CPU runs a batch of tasks: a thread per task, and threads for which there is none (left)
// help inside those that run.
#pragma once

#include "program/backend.h"

namespace fm::cpu {

index_t task_slots(index_t tasks);
using TaskBody = void (*)(void* state, index_t slot, index_t first, index_t count, const Exec&);
void for_each_task(index_t tasks, index_t slots, const Exec& exec, TaskBody body, void* state);

// In lockstep, for tests of that: all tasks in one slot, on this thread.
index_t one_slot(index_t tasks);
void all_tasks(index_t tasks, index_t slots, const Exec& exec, TaskBody body, void* state);
void whole_range(index_t n, index_t grain, void (*body)(void*, index_t, index_t), void* state);

void for_each_range(index_t n, index_t grain, void (*body)(void*, index_t, index_t), void* state);

template <class P>
FM_INLINE P* advance(P* pointer, index_t elements) {
  return pointer ? pointer + elements : nullptr;
}

// The arguments of one task out of those of T.
template <class S>
FM_INLINE LayerArgs<S> task_args(const LayerArgs<S>& args, index_t t) {
  if (args.tasks == 1) return args;
  const index_t in = t * args.samples * args.desc->in.size();
  const index_t out = t * args.samples * args.desc->out.size();
  LayerArgs<S> one = args;
  one.tasks = 1;
  one.x = advance(args.x, in);
  one.tx = advance(args.tx, in);
  one.dx = advance(args.dx, in);
  one.tdx = advance(args.tdx, in);
  one.y = advance(args.y, out);
  one.ty = advance(args.ty, out);
  one.dy = advance(args.dy, out);
  one.tdy = advance(args.tdy, out);
  one.w = advance(args.w, t * args.w_stride);
  one.tw = advance(args.tw, t * args.tw_stride);
  one.dw = advance(args.dw, t * args.dw_stride);
  one.tdw = advance(args.tdw, t * args.dw_stride);
  one.dw_base = advance(args.dw_base, t * args.dw_base_stride);
  one.saved = advance(args.saved, t * saved_count(*args.desc, args.samples));
  return one;
}

template <class S>
FM_INLINE Factors<S> task_factors(const Factors<S>& factors, index_t t) {
  Factors<S> one = factors;
  one.a = advance(factors.a, t * factors.a_stride);
  one.b = advance(factors.b, t * factors.b_stride);
  return one;
}

template <class S>
FM_INLINE LossArgs<S> task_args(const LossArgs<S>& args, index_t t, index_t target_bytes) {
  if (args.tasks == 1) return args;
  const index_t out = t * args.samples * args.outputs;
  LossArgs<S> one = args;
  one.tasks = 1;
  one.z = advance(args.z, out);
  one.tz = advance(args.tz, out);
  one.dz = advance(args.dz, out);
  one.tdz = advance(args.tdz, out);
  one.target = static_cast<const char*>(args.target) + t * args.samples * target_bytes;
  one.value = advance(args.value, t * args.value_stride);
  one.accuracy = advance(args.accuracy, t * args.value_stride);
  return one;
}

}  // namespace fm::cpu
