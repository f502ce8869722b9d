// The engine's own threads: a pool that sleeps between calls and spins a little before it does.
//
// A call is one loop over parts, for example tasks. A thread that finds no more of them helps those
// that still run: whoever runs a part may offer the loops inside it to its team, which is all who
// have nothing better to do. So few tasks on many threads have several threads each, and the last
// of many tasks get the threads that are done with theirs.
//
// Loops are cut into parts whose results do not depend on which thread ran them, so every result
// has the same bits for any number of threads. One call runs at a time; a second caller waits.
// Workers and, for the length of a call, the caller flush denormals to zero.
#pragma once

#include "common/types.h"

namespace fm::cpu {

// Threads a call may use, the caller included. `threads < 1` restores the default: the smallest of
// FASTMAML_NUM_THREADS (if set), the CPUs this process may run on, and its cgroup's CPU quota.
// Neither waits for a call that is running, whose number of threads stays what it was.
void set_num_threads(int threads);
int num_threads();

using PartBody = void (*)(void* state, int thread, index_t part);

// Runs body(state, thread, part) for part = 0 .. parts - 1 on at most `threads` threads; `thread` <
// `threads` is unique among those running. Not re-entrant: nested loops go through `team_parts`.
void run_parts(index_t parts, int threads, PartBody body, void* state);

// Inside a part that `thread` runs: who may help it, null if nobody ever does.
const void* team_of(int thread);

// As run_parts, from inside a part of it and on the team of the thread that runs that part.
void team_parts(const void* team, index_t parts, PartBody body, void* state);

// How many threads a loop is worth cutting for right now, at least 1. A guess: it depends on what
// the others happen to be doing.
int team_size(const void* team);

}  // namespace fm::cpu
