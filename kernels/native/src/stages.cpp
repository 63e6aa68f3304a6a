#include "stages.h"

#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace tidegate::native {
namespace {

struct Stages {
    Stage* first;
    std::size_t count;
};

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void wait_for(const Stage& stage) {
    // Tasks take microseconds. One that takes much longer is held up by another process, which may
    // be waiting for this very core.
    constexpr int spins = 20000;
    for (int i = 0; stage.done.load(std::memory_order_acquire) < stage.count; ++i) {
        if (i < spins) {
            relax();
        } else {
            std::this_thread::yield();
        }
    }
}

void work(void* argument, std::size_t) {
    const auto& stages = *static_cast<const Stages*>(argument);
    for (std::size_t s = 0; s < stages.count; ++s) {
        Stage& stage = stages.first[s];
        std::size_t mine = 0;
        for (std::size_t i = stage.taken.fetch_add(1, std::memory_order_relaxed); i < stage.count;
             i = stage.taken.fetch_add(1, std::memory_order_relaxed)) {
            stage.task(stage.argument, i);
            ++mine;
        }
        if (mine > 0) {
            stage.done.fetch_add(mine, std::memory_order_release);
        }
        if (s + 1 < stages.count) {
            wait_for(stage);
        }
    }
}

}  // namespace

void run_stages(Stage* stages, std::size_t count, const Parallel& parallel) {
    Stages all{stages, count};
    if (parallel.run == nullptr || parallel.threads < 2) {
        work(&all, 0);
        return;
    }
    parallel.run(parallel.context, static_cast<std::size_t>(parallel.threads), work, &all);
}

}  // namespace tidegate::native
