// The engine's own threads: a pool that sleeps between calls and spins a little before it does.
//
// Loops are cut into parts whose results do not depend on which thread ran them, so every result
// has the same bits for any number of threads. One loop runs at a time; a second caller waits.
// Workers and, for the length of a call, the caller flush denormals to zero.
#pragma once

#include "common/types.h"

namespace fm::cpu {

// Threads a call may use, the caller included. `threads < 1` restores the default: the smallest of
// FASTMAML_NUM_THREADS (if set), the CPUs this process may run on, and its cgroup's CPU quota.
void set_num_threads(int threads);
int num_threads();

using PartBody = void (*)(void* state, int thread, index_t part);

// Runs body(state, thread, part) for part = 0 .. parts - 1; `thread` < `threads` is unique among
// those running. Not re-entrant: nested loops go through `team_parts`.
void run_parts(index_t parts, int threads, PartBody body, void* state);

// As run_parts, from inside part 0 of a `run_team` call.
void team_parts(const void* team, index_t parts, PartBody body, void* state);
int team_size(const void* team);

// Runs body(state, team) on this thread with the pool's threads standing by for `team_parts`.
using TeamBody = void (*)(void* state, const void* team);
void run_team(TeamBody body, void* state);

}  // namespace fm::cpu
