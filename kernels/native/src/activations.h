// What the entry points share: quantised rows of a call, and how a call is cut into tasks.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel.h"
#include "packed_linear.h"

namespace tidegate::native {

// Memory of one call. It goes back to its thread for the next call; a task that makes a call itself
// finds none there and makes its own.
class Scratch {
public:
    explicit Scratch(std::size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // Aligned to `tile_alignment`.
    std::uint8_t* data() const { return data_; }

private:
    std::vector<std::uint8_t> buffer_;
    std::uint8_t* data_ = nullptr;
};

// The quantised rows of a call, in blocks.
class Activations {
public:
    Activations(const Weight& weight, std::int64_t block_rows, std::int64_t rows);

    std::int64_t blocks() const { return (rows_ + block_rows_ - 1) / block_rows_; }
    Block block(std::int64_t index) const;

private:
    std::size_t values_bytes_;
    std::size_t group_bytes_;
    std::int64_t rows_;
    std::int64_t block_rows_;
    Scratch scratch_;
};

Weight describe(const Shape& shape, const std::uint8_t* tiles);

// Rows x [rows, inputs], to be quantised one at a time.
struct Quantising {
    const Kernel& kernel;
    const Weight& weight;
    const Activations& activations;
    const float* x;
    std::int64_t inputs;
};

// A task: row `index`; `argument` is the `Quantising`.
void quantise_row(void* argument, std::size_t index);

// A product of quantised rows: y [rows, outputs] = x W^T (+ bias).
struct Multiplying {
    const Kernel& kernel;
    const Weight& weight;
    const Activations& activations;
    const float* bias;  // null for none
    float* y;
    std::int64_t outputs;
    std::int64_t tiles_per_task;
};

// A task: the `index`th run of tiles; `argument` is the `Multiplying`.
void multiply_tiles(void* argument, std::size_t index);

// Tiles of one task: about four tasks a thread, so that a slow core gets fewer, in whole panels;
// with many blocks of rows no more than a core's cache holds, for each block reads them all.
std::int64_t tiles_per_task(const Kernel& kernel, std::int64_t tiles, std::size_t tile_bytes,
                            std::int64_t blocks, std::int32_t threads);

}  // namespace tidegate::native
