// The C interface of libtidegate_native: for ctypes, benchmarks and `tidegate doctor`.
#include <cstring>
#include <exception>

#include "gated_mlp.h"
#include "packed_linear.h"
#include "threads.h"

#if defined(_WIN32)
#define TIDEGATE_EXPORT extern "C" __declspec(dllexport)
#else
#define TIDEGATE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

using tidegate::native::Shape;

thread_local std::string last_error;
thread_local std::string last_text;

template <typename Body>
std::int32_t guarded(Body body) {
    try {
        body();
        return 0;
    } catch (const std::exception& error) {
        last_error = error.what();
        return 1;
    }
}

Shape make_shape(std::int64_t inputs, std::int64_t outputs, std::int32_t bits, std::int32_t group,
                 std::int32_t zeros) {
    return {inputs, outputs, bits, group, zeros != 0};
}

}  // namespace

// The layout's version; tiles of another are not read.
TIDEGATE_EXPORT std::int32_t tidegate_native_version() {
    return tidegate::native::layout_version;
}

// What went wrong in this thread's last call that returned non-zero or null.
TIDEGATE_EXPORT const char* tidegate_native_error() {
    return last_error.c_str();
}

// The path in use; null if the environment names one that cannot run.
TIDEGATE_EXPORT const char* tidegate_native_path() {
    return guarded([] { last_text = tidegate::native::path(); }) == 0 ? last_text.c_str() : nullptr;
}

// The paths this CPU can run, best first, with commas between them.
TIDEGATE_EXPORT const char* tidegate_native_paths() {
    last_text.clear();
    for (const std::string& name : tidegate::native::paths()) {
        last_text += (last_text.empty() ? "" : ",") + name;
    }
    return last_text.c_str();
}

// Forces a path; null or "" undoes it.
TIDEGATE_EXPORT std::int32_t tidegate_native_force_path(const char* name) {
    return guarded([&] { tidegate::native::force_path(name == nullptr ? "" : name); });
}

// Bytes of the tiled weight, 0 if the shape is not allowed.
TIDEGATE_EXPORT std::uint64_t tidegate_native_tiled_bytes(std::int64_t inputs, std::int64_t outputs,
                                                          std::int32_t bits, std::int32_t group,
                                                          std::int32_t zeros) {
    std::uint64_t bytes = 0;
    guarded([&] {
        bytes = tidegate::native::tiled_bytes(make_shape(inputs, outputs, bits, group, zeros));
    });
    return bytes;
}

TIDEGATE_EXPORT std::int32_t tidegate_native_tile(std::int64_t inputs, std::int64_t outputs,
                                                  std::int32_t bits, std::int32_t group,
                                                  std::int32_t zeros, const std::uint8_t* values,
                                                  const std::uint16_t* scales_f16,
                                                  const std::uint8_t* packed_zeros,
                                                  std::uint8_t* out) {
    return guarded([&] {
        tidegate::native::tile(make_shape(inputs, outputs, bits, group, zeros), values, scales_f16,
                               packed_zeros, out);
    });
}

// `threads` includes the caller's.
TIDEGATE_EXPORT std::int32_t tidegate_native_linear(std::int64_t inputs, std::int64_t outputs,
                                                    std::int32_t bits, std::int32_t group,
                                                    std::int32_t zeros, const std::uint8_t* tiles,
                                                    const float* bias, const float* x,
                                                    std::int64_t rows, float* y,
                                                    std::int32_t threads) {
    return guarded([&] {
        tidegate::native::linear(make_shape(inputs, outputs, bits, group, zeros), tiles, bias, x,
                                 rows, y, tidegate::native::thread_pool(threads));
    });
}

// `shapes`: inputs, outputs, bits, group and zeros of both weights, and the gate: 11 numbers.
TIDEGATE_EXPORT std::int32_t tidegate_native_gated_mlp(const std::int64_t* shapes,
                                                       const std::uint8_t* gate_up,
                                                       const std::uint8_t* down, const float* x,
                                                       std::int64_t rows, float* y,
                                                       std::int32_t threads) {
    const auto shape = [](const std::int64_t* at) {
        return make_shape(at[0], at[1], static_cast<std::int32_t>(at[2]),
                          static_cast<std::int32_t>(at[3]), static_cast<std::int32_t>(at[4]));
    };
    return guarded([&] {
        const tidegate::native::Mlp mlp{shape(shapes), shape(shapes + 5),
                                             static_cast<tidegate::native::Gate>(shapes[10])};
        tidegate::native::gated_mlp(mlp, gate_up, down, x, rows, y,
                                    tidegate::native::thread_pool(threads));
    });
}

// A digest of memory, to find what a disk forgot; as fast as memory is read. Over 64-bit words
// (little-endian): eight lanes of h = h * prime + word from 0, one word to each in turn, and in the
// end one more such sum over the lanes. `bytes` is a multiple of 64.
TIDEGATE_EXPORT std::uint64_t tidegate_native_digest(const std::uint8_t* memory,
                                                     std::uint64_t bytes) {
    constexpr std::uint64_t prime = 0x9e3779b97f4a7c15u;
    std::uint64_t lanes[8] = {};
    for (std::uint64_t at = 0; at < bytes; at += 64) {
        std::uint64_t words[8];
        std::memcpy(words, memory + at, sizeof words);
        for (int lane = 0; lane < 8; ++lane) {
            lanes[lane] = lanes[lane] * prime + words[lane];
        }
    }
    std::uint64_t digest = 0;
    for (const std::uint64_t lane : lanes) {
        digest = digest * prime + lane;
    }
    return digest;
}

// Reads memory once, as fast as it comes, and does nothing with it: what `linear` is measured
// against. Returns the sum of its 64-bit words; `bytes` is cut to a multiple of 64.
TIDEGATE_EXPORT std::uint64_t tidegate_native_read(const std::uint64_t* memory, std::uint64_t bytes,
                                                   std::int32_t threads) {
    constexpr std::size_t pieces = 16;
    struct Read {
        const std::uint64_t* memory;
        std::size_t lines;
        std::uint64_t sums[pieces];
    } read{memory, static_cast<std::size_t>(bytes / 64), {}};
    const auto task = [](void* argument, std::size_t piece) {
        auto& call = *static_cast<Read*>(argument);
        const std::size_t first = call.lines * piece / pieces * 8;
        const std::size_t last = call.lines * (piece + 1) / pieces * 8;
        std::uint64_t sums[8] = {};
        for (std::size_t word = first; word < last; word += 8) {
            for (std::size_t i = 0; i < 8; ++i) {
                sums[i] += call.memory[word + i];
            }
        }
        for (const std::uint64_t sum : sums) {
            call.sums[piece] += sum;
        }
    };
    std::uint64_t total = 0;
    guarded([&] {
        const tidegate::native::Parallel parallel = tidegate::native::thread_pool(threads);
        for (std::size_t piece = 0; parallel.run == nullptr && piece < pieces; ++piece) {
            task(&read, piece);
        }
        if (parallel.run != nullptr) {
            parallel.run(parallel.context, pieces, task, &read);
        }
        for (const std::uint64_t sum : read.sums) {
            total += sum;
        }
    });
    return total;
}
