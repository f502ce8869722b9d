// Picks the kernels for this processor among those that were built.
#pragma once

#include <string>
#include <vector>

#include "program/backend.h"

namespace fm::cpu {

// Instruction sets built that this processor runs, the best one last.
std::vector<std::string> usable_isas();
// The one in use: the best, or what FASTMAML_ISA_USE or `use_isa` asked for.
std::string current_isa();
void use_isa(const std::string& name);

template <class S>
const Backend<S>& backend();

// The same kernels in lockstep, as a GPU runs: for tests of the driver.
template <class S>
const Backend<S>& lockstep_backend();

}  // namespace fm::cpu
