// Which path runs, chosen once from what the CPU can do.
#include "paths.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(TIDEGATE_X86)
#include <cpuid.h>
#elif defined(TIDEGATE_ARM64) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "packed_linear.h"

namespace tidegate::native {
namespace {

#if defined(TIDEGATE_X86)

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
    }();
}

bool has_avx512_vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

#if defined(TIDEGATE_AVX_VNNI_AS_EVEX)
bool has_avx_vnni() {
    return has_avx512_vnni();
}
#else
// Not among the names that every supported compiler knows: leaf 7, subleaf 1, EAX bit 4.
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
}
#endif

#elif defined(TIDEGATE_ARM64)

bool has_dotprod() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
    return true;  // every Mac with this instruction set has it
#else
    return false;
#endif
}

#endif

std::atomic<const Kernel*> forced{nullptr};

// What this CPU can run, best first.
const std::vector<const Kernel*>& available() {
    static const std::vector<const Kernel*> kernels = [] {
        std::vector<const Kernel*> found;
#if defined(TIDEGATE_X86)
        if (has_avx512_vnni()) {
            found.push_back(&avx512_vnni_kernel);
        }
        if (has_avx_vnni()) {
            found.push_back(&avx_vnni_kernel);
        }
        if (has_avx2()) {
            found.push_back(&avx2_kernel);
        }
#elif defined(TIDEGATE_ARM64)
        if (has_dotprod()) {
            found.push_back(&neon_dotprod_kernel);
        }
#endif
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
