// A small pool of threads for callers that have none of their own.
#pragma once

#include "packed_linear.h"

namespace tidegate::native {

// A `Parallel` over `threads` threads, the caller's among them, or as many as the system gives; they
// live as long as the process. One call runs at a time: a second waits, so none may come from inside
// a task.
Parallel thread_pool(std::int32_t threads);

}  // namespace tidegate::native
