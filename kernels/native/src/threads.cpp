// A small pool of threads for callers that have none of their own.
#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>

namespace tidegate::native {
namespace {

class Pool {
public:
    explicit Pool(std::int32_t threads) {
        try {
            for (std::int32_t i = 1; i < threads; ++i) {
                std::thread([this] { serve(); }).detach();
            }
        } catch (const std::system_error&) {
            // The system gives no more. Those that run hold `this`, and fewer do the same work.
        }
    }

    void run(std::size_t count, Parallel::Task task, void* argument) {
        const std::lock_guard<std::mutex> one_at_a_time(calls_);
        auto job = std::make_shared<Job>(count, task, argument);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            job_ = job;
            ++turn_;
        }
        wake_.notify_all();
        job->work();
        while (job->done.load(std::memory_order_acquire) < count) {
            std::this_thread::yield();
        }
    }

private:
    // A late thread may still hold a finished job, so each job has counters of its own.
    struct Job {
        Job(std::size_t n, Parallel::Task t, void* a) : count(n), task(t), argument(a) {}
        void work() {
            for (std::size_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
                task(argument, i);
                done.fetch_add(1, std::memory_order_release);
            }
        }
        const std::size_t count;
        const Parallel::Task task;
        void* const argument;
        std::atomic<std::size_t> next{0};
        std::atomic<std::size_t> done{0};
    };

    void serve() {
        std::uint64_t seen = 0;
        for (;;) {
            std::shared_ptr<Job> job;
            // Waking a sleeper costs tens of microseconds, as much as a small layer takes.
            for (int spin = 0; spin < 20000 && turn_.load(std::memory_order_acquire) == seen; ++spin) {
            }
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return turn_.load() != seen; });
                seen = turn_.load();
                job = job_;
            }
            job->work();
        }
    }

    std::mutex calls_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::shared_ptr<Job> job_;
    std::atomic<std::uint64_t> turn_{0};
};

Pool& pool_of(std::int32_t threads) {
    static std::mutex mutex;
    // Never destroyed: its threads end with the process.
    static auto* pools = new std::map<std::int32_t, std::unique_ptr<Pool>>();
    const std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<Pool>& pool = (*pools)[threads];
    if (pool == nullptr) {
        pool = std::make_unique<Pool>(threads);
    }
    return *pool;
}

}  // namespace

Parallel thread_pool(std::int32_t threads) {
    if (threads < 1 || threads > 256) {
        throw std::invalid_argument("threads = " + std::to_string(threads) + ": must be 1 to 256");
    }
    if (threads == 1) {
        return {};
    }
    const auto run = [](void* context, std::size_t count, Parallel::Task task, void* argument) {
        static_cast<Pool*>(context)->run(count, task, argument);
    };
    return {run, &pool_of(threads), threads};
}

}  // namespace tidegate::native
