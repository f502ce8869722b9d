// Large pages for the workspace.
#pragma once

#include "common/types.h"

namespace fm::cpu {

// Asks the kernel to back whole aligned 2 MiB blocks of memory that nobody has touched yet by one
// page each, where it gives them to those who ask: a fault and an entry of the TLB serve 512 times
// as much. A wish; nothing happens elsewhere, or where it is refused.
void wish_for_huge_pages(void* memory, index_t bytes);

}  // namespace fm::cpu
