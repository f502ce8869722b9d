#include "cpu/backend_cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "common/error.h"

#define FM_DECLARE(isa)                            \
  namespace fm::cpu::isa##_f32 {                   \
    const fm::Backend<float>& backend();           \
    const fm::Backend<float>& lockstep_backend();  \
  }                                                \
  namespace fm::cpu::isa##_f64 {                   \
    const fm::Backend<double>& backend();          \
    const fm::Backend<double>& lockstep_backend(); \
  }

FM_DECLARE(baseline)
#if defined(FM_HAVE_AVX2)
FM_DECLARE(avx2)
#endif
#if defined(FM_HAVE_AVX512)
FM_DECLARE(avx512)
#endif

namespace fm::cpu {
namespace {

struct Isa {
  const char* name;
  bool runs;
  const Backend<float>& (*f32)(), &(*lockstep_f32)();
  const Backend<double>& (*f64)(), &(*lockstep_f64)();
};

const std::vector<Isa>& built() {
  static const std::vector<Isa> isas = {
      {"baseline", true, baseline_f32::backend, baseline_f32::lockstep_backend,
       baseline_f64::backend, baseline_f64::lockstep_backend},
#if defined(FM_HAVE_AVX2)
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2_f32::backend,
       avx2_f32::lockstep_backend, avx2_f64::backend, avx2_f64::lockstep_backend},
#endif
#if defined(FM_HAVE_AVX512)
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"),
       avx512_f32::backend, avx512_f32::lockstep_backend, avx512_f64::backend,
       avx512_f64::lockstep_backend},
#endif
  };
  return isas;
}

const Isa& find(const std::string& name) {
  std::string usable;
  for (const Isa& isa : built()) {
    if (!isa.runs) continue;
    if (name == isa.name) return isa;
    usable += std::string(usable.empty() ? "" : ", ") + isa.name;
  }
  fail("instruction set: expected one of ", usable, " (built, and run by this processor), got '",
       name, "'");
}

std::atomic<const Isa*> chosen{nullptr};

const Isa& current() {
  if (const Isa* isa = chosen) return *isa;
  const char* wish = std::getenv("FASTMAML_ISA_USE");
  const Isa* none = nullptr;
  chosen.compare_exchange_strong(none, &find(wish && *wish ? wish : usable_isas().back()));
  return *chosen;
}

}  // namespace

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : built()) {
    if (isa.runs) names.push_back(isa.name);
  }
  return names;
}

std::string current_isa() { return current().name; }

void use_isa(const std::string& name) { chosen = &find(name); }

template <>
const Backend<float>& backend<float>() {
  return current().f32();
}

template <>
const Backend<double>& backend<double>() {
  return current().f64();
}

template <>
const Backend<float>& lockstep_backend<float>() {
  return current().lockstep_f32();
}

template <>
const Backend<double>& lockstep_backend<double>() {
  return current().lockstep_f64();
}

}  // namespace fm::cpu
