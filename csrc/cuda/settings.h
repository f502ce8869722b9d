// What a user may set of the CUDA backend, by environment.
#pragma once

#include <cstdlib>
#include <string>

namespace fm {

// Whether kernels may begin early where the GPU can (early_launch.h); FASTMAML_EARLY_LAUNCH=0
// forbids it. Asked once.
inline bool early_launches() {
  static const bool allowed = [] {
    const char* wish = std::getenv("FASTMAML_EARLY_LAUNCH");
    return !wish || std::string(wish) != "0";
  }();
  return allowed;
}

}  // namespace fm
