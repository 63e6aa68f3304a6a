// A small pool of threads for callers that have none of their own.
#pragma once

#include "packed_linear.h"

namespace tidegate::native {

// A `Parallel` over `threads` threads, the caller's among them; they live as long as the process.
// One call runs at a time: a second waits.
Parallel thread_pool(std::int32_t threads);

}  // namespace tidegate::native
