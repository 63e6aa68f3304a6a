// Which path runs, chosen once from what the CPU can do.
#include "paths.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "packed_linear.h"

namespace tidegate::native {
namespace {

std::atomic<const Kernel*> forced{nullptr};

// What this CPU can run, best first.
const std::vector<const Kernel*>& available() {
    static const std::vector<const Kernel*> kernels = [] {
        std::vector<const Kernel*> found;
        found.push_back(&portable_kernel);
        return found;
    }();
    return kernels;
}

const Kernel& named(const std::string& name, const char* setting) {
    std::string allowed;
    for (const Kernel* kernel : available()) {
        if (name == kernel->name) {
            return *kernel;
        }
        allowed += (allowed.empty() ? "" : ", ") + std::string(kernel->name);
    }
    throw std::invalid_argument(std::string(setting) + " = " + name + ": must be one of " +
                                allowed);
}

const Kernel& preferred() {
    static const Kernel& kernel = []() -> const Kernel& {
        const char* name = std::getenv("TIDEGATE_NATIVE_PATH");
        const bool set = name != nullptr && *name != '\0';
        return set ? named(name, "TIDEGATE_NATIVE_PATH") : *available().front();
    }();
    return kernel;
}

}  // namespace

const Kernel& chosen_kernel() {
    const Kernel* kernel = forced.load(std::memory_order_relaxed);
    return kernel != nullptr ? *kernel : preferred();
}

std::vector<std::string> paths() {
    std::vector<std::string> names;
    for (const Kernel* kernel : available()) {
        names.emplace_back(kernel->name);
    }
    return names;
}

std::string path() {
    return chosen_kernel().name;
}

void force_path(const std::string& name) {
    forced.store(name.empty() ? nullptr : &named(name, "path"), std::memory_order_relaxed);
}

}  // namespace tidegate::native
