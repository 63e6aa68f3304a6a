// Several loops, one after another, in one parallel region.
//
// Handing work to other threads costs more than a small loop takes, so threads are called once and
// then go from loop to loop together. None waits for a thread that has not come: whoever is there
// does the work, and a thread that comes late finds nothing left.
#pragma once

#include <atomic>
#include <cstddef>

#include "packed_linear.h"

namespace tidegate::native {

// task(argument, i) for every i in [0, count), once each, on any threads. All of it is done, and
// seen by every thread, before the next stage begins.
struct Stage {
    Stage(std::size_t n, Parallel::Task t, void* a) : count(n), task(t), argument(a) {}

    const std::size_t count;
    const Parallel::Task task;
    void* const argument;
    // On lines of their own: threads take turns on one while they wait for the other.
    alignas(64) std::atomic<std::size_t> taken{0};
    alignas(64) std::atomic<std::size_t> done{0};
};

// Runs `stages` in order; returns when the last is done.
void run_stages(Stage* stages, std::size_t count, const Parallel& parallel);

}  // namespace tidegate::native
