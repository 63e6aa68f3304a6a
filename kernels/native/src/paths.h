// Which path runs, chosen once from what the CPU can do.
#pragma once

#include "kernel.h"

namespace tidegate::native {

// The kernel that `linear` uses now; see `path` for the choice.
const Kernel& chosen_kernel();

}  // namespace tidegate::native
