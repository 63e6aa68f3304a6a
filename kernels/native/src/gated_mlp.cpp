#include "gated_mlp.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "activations.h"
#include "paths.h"
#include "stages.h"

namespace tidegate::native {
namespace {

// Tiles of gates that a task computes before it turns to their partners: all rows of a block of
// both fit into half of a first-level cache.
constexpr std::int64_t run_tiles = 16;

struct Gating {
    const Kernel& kernel;
    const Weight& weight;
    const Activations& activations;
    bool gelu;
    float* inner;
    std::int64_t width;
    std::int64_t tiles_per_task;
};

// Gates and their partners of `run_tiles` tiles at most, for one block of rows.
void gate_run(const Gating& call, const Block& block, std::int64_t first, std::int64_t last,
              float* inner) {
    alignas(64) float gates[most_block_rows * run_tiles * tile_outputs];
    alignas(64) float ups[most_block_rows * run_tiles * tile_outputs];
    const std::int64_t count = (last - first) * tile_outputs;
    Weight weight = call.weight;
    weight.tiles += first * weight.tile_bytes;
    call.kernel.multiply(weight, block, 0, last - first, gates, count);
    weight.tiles += call.width / tile_outputs * weight.tile_bytes;
    call.kernel.multiply(weight, block, 0, last - first, ups, count);
    for (std::int32_t row = 0; row < block.rows; ++row) {
        call.kernel.gate(call.gelu, gates + row * count, ups + row * count, count,
                         inner + row * call.width + first * tile_outputs);
    }
}

void gate_tiles(void* argument, std::size_t index) {
    const auto& call = *static_cast<const Gating*>(argument);
    const std::int64_t begin = static_cast<std::int64_t>(index) * call.tiles_per_task;
    const std::int64_t end = std::min(begin + call.tiles_per_task, call.width / tile_outputs);
    for (std::int64_t b = 0; b < call.activations.blocks(); ++b) {
        const Block block = call.activations.block(b);
        float* inner = call.inner + b * call.kernel.block_rows * call.width;
        for (std::int64_t first = begin; first < end; first += run_tiles) {
            gate_run(call, block, first, std::min(first + run_tiles, end), inner);
        }
    }
}

}  // namespace

void check(const Mlp& mlp) {
    check(mlp.gate_up);
    check(mlp.down);
    const std::int64_t width = mlp.down.inputs;
    if (mlp.gate_up.outputs != 2 * width) {
        throw std::invalid_argument("gate_up.outputs = " + std::to_string(mlp.gate_up.outputs) +
                                    ": must be " + std::to_string(2 * width));
    }
    if (width % tile_outputs != 0) {
        throw std::invalid_argument("down.inputs = " + std::to_string(width) +
                                    ": must be a multiple of " + std::to_string(tile_outputs));
    }
    if (mlp.gate != Gate::silu && mlp.gate != Gate::gelu_tanh) {
        throw std::invalid_argument("gate = " + std::to_string(static_cast<int>(mlp.gate)) +
                                    ": must be 0 (silu) or 1 (gelu_tanh)");
    }
}

void gated_mlp(const Mlp& mlp, const std::uint8_t* gate_up, const std::uint8_t* down,
               const float* x, std::int64_t rows, float* y, const Parallel& parallel) {
    check(mlp);
    if (rows <= 0) {
        return;
    }
    const Kernel& kernel = chosen_kernel();
    const std::int64_t width = mlp.down.inputs, outputs = mlp.down.outputs;
    const Weight first = describe(mlp.gate_up, gate_up), second = describe(mlp.down, down);
    const Activations given(first, kernel.block_rows, rows);
    const Activations between(second, kernel.block_rows, rows);
    const Scratch scratch(rows * width * sizeof(float));
    auto* inner = reinterpret_cast<float*>(scratch.data());

    const std::int64_t pairs = width / tile_outputs;
    const std::int64_t last = (outputs + tile_outputs - 1) / tile_outputs;
    const std::int64_t pairs_each =
        tiles_per_task(kernel, pairs, 2 * first.tile_bytes, given.blocks(), parallel.threads);
    const std::int64_t last_each =
        tiles_per_task(kernel, last, second.tile_bytes, given.blocks(), parallel.threads);
    const auto tasks = [](std::int64_t tiles, std::int64_t each) {
        return static_cast<std::size_t>((tiles + each - 1) / each);
    };
    Quantising outer_rows{kernel, first, given, x, mlp.gate_up.inputs};
    Gating gating{kernel, first, given, mlp.gate == Gate::gelu_tanh, inner, width, pairs_each};
    Quantising inner_rows{kernel, second, between, inner, width};
    Multiplying multiplying{kernel, second, between, nullptr, y, outputs, last_each};
    Stage stages[] = {
        {static_cast<std::size_t>(rows), quantise_row, &outer_rows},
        {tasks(pairs, pairs_each), gate_tiles, &gating},
        {static_cast<std::size_t>(rows), quantise_row, &inner_rows},
        {tasks(last, last_each), multiply_tiles, &multiplying},
    };
    run_stages(stages, 4, parallel);
}

}  // namespace tidegate::native
