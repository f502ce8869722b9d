// How many threads this process may use without getting in its own way.
#pragma once

namespace fm::cpu {

// The smallest of FASTMAML_NUM_THREADS (if set), the CPUs this process may run on, and its cgroup's
// CPU quota; at least 1.
int default_threads();

}  // namespace fm::cpu
