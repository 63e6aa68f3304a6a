// What a path implements, and the forms that activations and weights have when they reach it.
//
// A header for translation units with flags of their own: it must instantiate nothing from the
// standard library, or a baseline CPU could be given code that was compiled for another.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace tidegate::native {

// The most rows that any path's block of activations has.
constexpr int most_block_rows = 8;

// A weight, as kernels see it.
struct Weight {
    const uint8_t* tiles;
    size_t tile_bytes;    // from one tile to the next
    size_t record_bytes;  // from one group to the next
    int64_t groups;
    int32_t group;         // inputs of a group
    int32_t per_group;     // activation groups in a group
    int32_t act_group;     // inputs of an activation group
    int32_t bits;          // 4 or 8
    bool zeros;            // records hold zero-points
};

// Up to `Kernel::block_rows` quantised rows, interleaved so that a kernel reads them as one stream.
struct Block {
    int8_t* values;   // [inputs / 4][rows][4]
    float* scales;    // [activation groups][rows]
    int32_t* sums;    // [activation groups][rows]: minus the sum of the group's values
    int32_t rows;
};

// One path.
struct Kernel {
    const char* name;
    int32_t block_rows;   // rows that one pass over the weights serves
    int32_t panel_tiles;  // tiles that one pass holds: the work is cut into multiples of them
    // Quantises one row of `inputs` floats as row `row` of `block`, with zeros up to whole groups.
    void (*quantise)(const Weight& weight, const float* x, int64_t inputs, const Block& block,
                     int32_t row);
    // Tiles [first, last) of one block: y[row * stride + tile * 16 + lane], without bias. `y` has
    // room for whole tiles.
    void (*multiply)(const Weight& weight, const Block& block, int64_t first, int64_t last,
                     float* y, int64_t stride);
    // out[i] = act(gates[i]) * ups[i] for `count` values; see gated_mlp.h.
    void (*gate)(bool gelu, const float* gates, const float* ups, int64_t count, float* out);
};

// m below this counts as zero: nothing after it can then be a denormal.
constexpr float smallest_activation = 0x1p-64f;

extern const Kernel portable_kernel;
#if defined(TIDEGATE_X86)
extern const Kernel avx2_kernel;
extern const Kernel avx_vnni_kernel;
extern const Kernel avx512_vnni_kernel;
#elif defined(TIDEGATE_ARM64)
extern const Kernel neon_dotprod_kernel;
#endif

}  // namespace tidegate::native
