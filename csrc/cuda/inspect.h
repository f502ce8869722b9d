// Memory of the host emulation that nothing but a kernel can touch, for tests.
//
// Pages of `device_memory` are without access except while a kernel runs, as a GPU's memory is to
// the host: a driver that reads there ends the process by a signal, and so does a kernel that has
// not awaited those before it. They are never given back.
#pragma once

#include <cstddef>

namespace fm::cuda_emulated {

void* device_memory(std::size_t bytes);

}  // namespace fm::cuda_emulated
