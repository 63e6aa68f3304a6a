// y = x W^T (+ b) over 4- or 8-bit weights in groups, for one row as for hundreds, on one CPU.
//
// One tile layout serves every instruction set and every number of rows, so tiled weights can be
// kept in a file. A tile is 16 output rows; it holds one record per group along the input:
//
//     scales   f16 [16]                       one per output row
//     zeros    u8  [16]                       only if shape.zeros
//     values   u8  [group / step][16][4]      step inputs of 16 rows: 64 bytes
//
// At 8 bits a 64-byte vector holds 4 inputs of each row (step = 4). At 4 bits it holds 8: the low
// nibbles are inputs 0-3, the high nibbles inputs 4-7 (step = 8). Tiles start at multiples of 64
// bytes. Rows past the last output have scale 0.
//
// Arithmetic, the same in every path to the last bit, whatever the rows, threads and tiles:
//
//     per row and activation group:   m = max |x|,  a = m / 127,  q = round_even(x * (127 / m))
//     i = sum((value - zero) * q)                                      exact, int32
//     acc = fma(float(i), scale * a, acc)                              groups in order
//     y = acc + bias
//
// An activation group whose m is below 2^-64 counts as zeros; one that holds an infinity or a NaN
// makes its row NaN. The float environment must be the default one (round to nearest).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace tidegate::native {

// Changes whenever the bytes that `tile` writes change their meaning.
constexpr std::int32_t layout_version = 1;

// Tiles, and the buffer a caller gives to `tile`, start at a multiple of this many bytes.
constexpr std::size_t tile_alignment = 64;

// Output rows of a tile.
constexpr std::int64_t tile_outputs = 16;

// What a weight is; see `check` for what is allowed.
struct Shape {
    std::int64_t inputs = 0;
    std::int64_t outputs = 0;
    std::int32_t bits = 4;   // 4 or 8
    std::int32_t group = 0;  // inputs that share a scale: a multiple of 16
    bool zeros = false;      // has zero-points; without, they are 8 (4 bits) or 128 (8 bits)
};

// Throws std::invalid_argument naming the field, its value and what is allowed.
void check(const Shape& shape);

// Groups along the input; the last may be filled in part.
std::int64_t groups(const Shape& shape);

// Inputs that share one activation scale: the largest of 64, 48, 32 and 16 that divides `group`.
std::int32_t activation_group(const Shape& shape);

// Bytes that `tile` writes: a multiple of `tile_alignment`.
std::size_t tiled_bytes(const Shape& shape);

// Re-tiles a `PackedLinear`:
//   values       u8 [outputs, groups, group * bits / 8], low nibble first
//   scales_f16   IEEE half bits [outputs, groups]
//   packed_zeros u8 [outputs, ceil(groups * bits / 8)], low nibble first; null if !shape.zeros
//   out          tiled_bytes(shape) bytes, aligned to `tile_alignment`
void tile(const Shape& shape, const std::uint8_t* values, const std::uint16_t* scales_f16,
          const std::uint8_t* packed_zeros, std::uint8_t* out);

// How the caller runs tasks at the same time. `run(context, count, task, argument)` calls
// task(argument, i) once for every i in [0, count), in any order, on any threads, and returns when
// all have. Tasks do not throw. With `run` null they run one after another on this thread.
struct Parallel {
    using Task = void (*)(void* argument, std::size_t index);
    void (*run)(void* context, std::size_t count, Task task, void* argument) = nullptr;
    void* context = nullptr;
    std::int32_t threads = 1;  // how many tasks run at once: decides how the work is cut
};

// y = x W^T (+ bias).
//   tiles  what `tile` wrote, aligned to `tile_alignment`
//   bias   float [outputs], or null
//   x      float [rows, inputs]
//   y      float [rows, outputs]
// Safe to call from several threads at once, also from inside a task of another call.
void linear(const Shape& shape, const std::uint8_t* tiles, const float* bias, const float* x,
            std::int64_t rows, float* y, const Parallel& parallel);

// The paths this CPU can run, best first: "avx512-vnni", "avx-vnni", "avx2", "neon-dotprod",
// "portable".
std::vector<std::string> paths();

// The path `linear` takes: the forced one, else the one the environment variable
// TIDEGATE_NATIVE_PATH names, else the best. Throws std::invalid_argument if that variable names
// one that this CPU cannot run.
std::string path();

// Forces a path by name; an empty name undoes it. Throws std::invalid_argument.
void force_path(const std::string& name);

}  // namespace tidegate::native
