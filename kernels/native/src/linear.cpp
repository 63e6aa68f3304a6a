// One product: rows are quantised, then runs of tiles multiplied, on any path.
#include "activations.h"
#include "packed_linear.h"
#include "paths.h"
#include "stages.h"

namespace tidegate::native {

void linear(const Shape& shape, const std::uint8_t* tiles, const float* bias, const float* x,
            std::int64_t rows, float* y, const Parallel& parallel) {
    check(shape);
    if (rows <= 0) {
        return;
    }
    const Kernel& kernel = chosen_kernel();
    const Weight weight = describe(shape, tiles);
    const Activations activations(weight, kernel.block_rows, rows);
    const std::int64_t count = (shape.outputs + tile_outputs - 1) / tile_outputs;
    const std::int64_t each = tiles_per_task(kernel, count, weight.tile_bytes, activations.blocks(),
                                             parallel.threads);
    Quantising quantising{kernel, weight, activations, x, shape.inputs};
    Multiplying multiplying{kernel, weight, activations, bias, y, shape.outputs, each};
    Stage stages[] = {
        {static_cast<std::size_t>(rows), quantise_row, &quantising},
        {static_cast<std::size_t>((count + each - 1) / each), multiply_tiles, &multiplying},
    };
    run_stages(stages, 2, parallel);
}

}  // namespace tidegate::native
