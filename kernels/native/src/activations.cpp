#include "activations.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "tile.h"

namespace tidegate::native {
namespace {

thread_local std::vector<std::vector<std::uint8_t>> spare;

// The last tile where outputs do not fill it: through a buffer that has room for all of it.
void multiply_tail(const Multiplying& call, const Block& block, std::int64_t tile, float* y) {
    float whole[most_block_rows * tile_outputs];
    Weight weight = call.weight;
    weight.tiles += tile * weight.tile_bytes;
    call.kernel.multiply(weight, block, 0, 1, whole, tile_outputs);
    const std::int64_t first = tile * tile_outputs;
    for (std::int32_t row = 0; row < block.rows; ++row) {
        std::memcpy(y + row * call.outputs + first, whole + row * tile_outputs,
                    (call.outputs - first) * sizeof(float));
    }
}

}  // namespace

Scratch::Scratch(std::size_t bytes) {
    if (!spare.empty()) {
        buffer_ = std::move(spare.back());
        spare.pop_back();
    }
    if (buffer_.size() < bytes + tile_alignment) {
        buffer_.resize(bytes + tile_alignment);
    }
    const auto address = reinterpret_cast<std::uintptr_t>(buffer_.data());
    data_ = buffer_.data() + (tile_alignment - address % tile_alignment) % tile_alignment;
}

Scratch::~Scratch() { spare.push_back(std::move(buffer_)); }

Activations::Activations(const Weight& weight, std::int64_t block_rows, std::int64_t rows)
    : values_bytes_(weight.groups * weight.per_group * weight.act_group),
      group_bytes_(weight.groups * weight.per_group * sizeof(float)),
      rows_(rows),
      block_rows_(block_rows),
      scratch_(rows * (values_bytes_ + 2 * group_bytes_)) {}

Block Activations::block(std::int64_t index) const {
    const std::int64_t first = index * block_rows_;
    const auto rows = static_cast<std::int32_t>(std::min(block_rows_, rows_ - first));
    std::uint8_t* place = scratch_.data() + first * (values_bytes_ + 2 * group_bytes_);
    auto* scales = reinterpret_cast<float*>(place + rows * values_bytes_);
    auto* sums = reinterpret_cast<std::int32_t*>(place + rows * (values_bytes_ + group_bytes_));
    return {reinterpret_cast<std::int8_t*>(place), scales, sums, rows};
}

Weight describe(const Shape& shape, const std::uint8_t* tiles) {
    const std::int32_t act_group = activation_group(shape);
    return {tiles,         tile_bytes(shape), record_bytes(shape),
            groups(shape), shape.group,       shape.group / act_group,
            act_group,     shape.bits,        shape.zeros};
}

void quantise_row(void* argument, std::size_t index) {
    const auto& call = *static_cast<const Quantising*>(argument);
    const auto row = static_cast<std::int64_t>(index);
    const Block block = call.activations.block(row / call.kernel.block_rows);
    call.kernel.quantise(call.weight, call.x + row * call.inputs, call.inputs, block,
                         static_cast<std::int32_t>(row % call.kernel.block_rows));
}

void multiply_tiles(void* argument, std::size_t index) {
    const auto& call = *static_cast<const Multiplying*>(argument);
    const std::int64_t outputs = call.outputs;
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

std::int64_t tiles_per_task(const Kernel& kernel, std::int64_t tiles, std::size_t tile_bytes,
                            std::int64_t blocks, std::int32_t threads) {
    constexpr std::int64_t cached_bytes = 256 << 10;
    const std::int64_t panel = kernel.panel_tiles;
    std::int64_t each = tiles / (std::int64_t{std::max(threads, 1)} * 4);
    if (blocks > 1) {
        each = std::min<std::int64_t>(each, cached_bytes / tile_bytes);
    }
    return std::max<std::int64_t>(1, (each + panel - 1) / panel) * panel;
}

}  // namespace tidegate::native
