// What tests ask of the host emulation: which kernels have been launched, and memory that nothing
// but a kernel can touch.
//
// Pages of `device_memory` are without access except while a kernel runs, as a GPU's memory is to
// the host: a driver that reads there ends the process by a signal. They are never given back.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace fm::cuda_emulated {

// Notes the kernels launched from now on, in all OS threads.
void record_launches();
// Their names in order; stops noting them.
std::vector<std::string> recorded_launches();

void* device_memory(std::size_t bytes);

}  // namespace fm::cuda_emulated
