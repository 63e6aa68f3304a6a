// How one call is cut into blocks of rows and runs of tiles, for any path.
#include <algorithm>
#include <cstring>
#include <utility>

#include "packed_linear.h"
#include "paths.h"
#include "tile.h"

namespace tidegate::native {
namespace {

// Quantised activations of one call. The buffer goes back to its thread for the next call; a task
// that calls `linear` itself finds none there and makes its own.
class Activations {
public:
    Activations(const Weight& weight, std::int64_t block_rows, std::int64_t rows)
        : buffer_(std::move(spare_)), rows_(rows), block_rows_(block_rows) {
        const std::size_t act_groups = weight.groups * weight.per_group;
        values_bytes_ = act_groups * weight.act_group;
        group_bytes_ = act_groups * sizeof(float);
        const std::size_t bytes = rows * (values_bytes_ + 2 * group_bytes_);
        if (buffer_.size() < bytes + tile_alignment) {
            buffer_.resize(bytes + tile_alignment);
        }
        auto address = reinterpret_cast<std::uintptr_t>(buffer_.data());
        first_ = buffer_.data() + (tile_alignment - address % tile_alignment) % tile_alignment;
    }
    ~Activations() { spare_ = std::move(buffer_); }
    Activations(const Activations&) = delete;
    Activations& operator=(const Activations&) = delete;

    std::int64_t blocks() const { return (rows_ + block_rows_ - 1) / block_rows_; }

    Block block(std::int64_t index) const {
        const std::int64_t first = index * block_rows_;
        const auto rows = static_cast<std::int32_t>(std::min(block_rows_, rows_ - first));
        std::uint8_t* place = first_ + first * (values_bytes_ + 2 * group_bytes_);
        auto* scales = reinterpret_cast<float*>(place + rows * values_bytes_);
        auto* sums = reinterpret_cast<std::int32_t*>(place + rows * (values_bytes_ + group_bytes_));
        return {reinterpret_cast<std::int8_t*>(place), scales, sums, rows};
    }

private:
    static thread_local std::vector<std::uint8_t> spare_;
    std::vector<std::uint8_t> buffer_;
    std::uint8_t* first_ = nullptr;
    std::size_t values_bytes_ = 0;
    std::size_t group_bytes_ = 0;
    std::int64_t rows_;
    std::int64_t block_rows_;
};

thread_local std::vector<std::uint8_t> Activations::spare_;

// One call, as its tasks see it.
struct Call {
    const Kernel& kernel;
    const Weight& weight;
    const Shape& shape;
    const Activations& activations;
    const float* bias;
    const float* x;
    float* y;
    std::int64_t tiles_per_task;
};

Weight describe(const Shape& shape, const std::uint8_t* tiles) {
    const std::int32_t act_group = activation_group(shape);
    return {tiles,       tile_bytes(shape), record_bytes(shape),
            groups(shape), shape.group,     shape.group / act_group,
            act_group,   shape.bits,        shape.zeros};
}

void run(const Parallel& parallel, std::size_t count, Parallel::Task task, void* argument) {
    if (parallel.run != nullptr && count > 1) {
        parallel.run(parallel.context, count, task, argument);
        return;
    }
    for (std::size_t index = 0; index < count; ++index) {
        task(argument, index);
    }
}

void quantise_rows(void* argument, std::size_t index) {
    const Call& call = *static_cast<const Call*>(argument);
    const Block block = call.activations.block(static_cast<std::int64_t>(index));
    const float* x = call.x + static_cast<std::int64_t>(index) * call.kernel.block_rows *
                                  call.shape.inputs;
    for (std::int32_t row = 0; row < block.rows; ++row) {
        call.kernel.quantise(call.weight, x + row * call.shape.inputs, call.shape.inputs, block,
                             row);
    }
}

// The last tile where outputs do not fill it: through a buffer that has room for all of it.
void multiply_tail(const Call& call, const Block& block, std::int64_t tile, float* y) {
    float whole[most_block_rows * tile_outputs];
    Weight weight = call.weight;
    weight.tiles += tile * weight.tile_bytes;
    call.kernel.multiply(weight, block, 0, 1, whole, tile_outputs);
    const std::int64_t first = tile * tile_outputs;
    for (std::int32_t row = 0; row < block.rows; ++row) {
        std::memcpy(y + row * call.shape.outputs + first, whole + row * tile_outputs,
                    (call.shape.outputs - first) * sizeof(float));
    }
}

void multiply_tiles(void* argument, std::size_t index) {
    const Call& call = *static_cast<const Call*>(argument);
    const std::int64_t outputs = call.shape.outputs;
    const std::int64_t first = static_cast<std::int64_t>(index) * call.tiles_per_task;
    const std::int64_t end = std::min((first + call.tiles_per_task) * tile_outputs, outputs);
    const std::int64_t whole = end / tile_outputs;
    for (std::int64_t b = 0; b < call.activations.blocks(); ++b) {
        const Block block = call.activations.block(b);
        float* y = call.y + b * call.kernel.block_rows * outputs;
        call.kernel.multiply(call.weight, block, first, whole, y, outputs);
        if (end % tile_outputs != 0) {
            multiply_tail(call, block, whole, y);
        }
        for (std::int32_t row = 0; call.bias != nullptr && row < block.rows; ++row) {
            for (std::int64_t o = first * tile_outputs; o < end; ++o) {
                y[row * outputs + o] += call.bias[o];
            }
        }
    }
}

// Tiles of one task: about four tasks a thread, so that a slow core gets fewer, in whole panels;
// with many rows no more than the second-level cache holds, for each block of rows reads them all.
std::int64_t cut(const Call& call, std::int64_t tiles, std::int32_t threads) {
    constexpr std::int64_t cached_bytes = 256 << 10;
    const std::int64_t panel = call.kernel.panel_tiles;
    std::int64_t each = tiles / (std::int64_t{threads} * 4);
    if (call.activations.blocks() > 1) {
        each = std::min<std::int64_t>(each, cached_bytes / call.weight.tile_bytes);
    }
    return std::max<std::int64_t>(1, (each + panel - 1) / panel) * panel;
}

}  // namespace

void linear(const Shape& shape, const std::uint8_t* tiles, const float* bias, const float* x,
            std::int64_t rows, float* y, const Parallel& parallel) {
    check(shape);
    if (rows <= 0) {
        return;
    }
    const Kernel& kernel = chosen_kernel();
    const Weight weight = describe(shape, tiles);
    const Activations activations(weight, kernel.block_rows, rows);
    Call call{kernel, weight, shape, activations, bias, x, y, 0};
    const std::int64_t count = (shape.outputs + tile_outputs - 1) / tile_outputs;
    call.tiles_per_task = cut(call, count, std::max(parallel.threads, 1));
    run(parallel, activations.blocks(), quantise_rows, &call);
    const std::int64_t tasks = (count + call.tiles_per_task - 1) / call.tiles_per_task;
    run(parallel, tasks, multiply_tiles, &call);
}

}  // namespace tidegate::native
