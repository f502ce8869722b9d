#include "cpu/thread_limits.h"

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>

namespace fm::cpu {
namespace {

int cgroup_quota() {
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (v2 >> quota >> period) {
    if (quota == "max" || period <= 0) return 0;
    return std::max(1, int(std::strtod(quota.c_str(), nullptr) / period + 0.5));
  }
  std::ifstream v1("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
  std::ifstream v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double limit = 0;
  if ((v1 >> limit) && (v1_period >> period) && limit > 0 && period > 0) {
    return std::max(1, int(limit / period + 0.5));
  }
  return 0;
}

}  // namespace

int default_threads() {
  int threads = int(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) threads = CPU_COUNT(&set);
#endif
  if (const int quota = cgroup_quota()) threads = std::min(threads, quota);
  if (const char* wish = std::getenv("FASTMAML_NUM_THREADS")) {
    const int value = std::atoi(wish);
    if (value > 0) threads = value;
  }
  return std::max(1, threads);
}

}  // namespace fm::cpu
