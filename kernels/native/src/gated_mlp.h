// y = (act(x G^T) * (x U^T)) D^T over packed weights: the gated MLP of a decoder layer, in one
// parallel region, its inner rows never written at more than one width.
//
// G and U are one weight, G's outputs first. Products and activation groups are those of
// packed_linear.h. The same in every path to the last bit:
//
//     silu       t = g
//     gelu_tanh  t = g * fma(0.07135481627, g * g, 1.59576912161)
//     inner      g / (1 + exp(-t)) * u
//
// exp as in gate.h.
#pragma once

#include "packed_linear.h"

namespace tidegate::native {

enum class Gate : std::int32_t { silu = 0, gelu_tanh = 1 };

struct Mlp {
    Shape gate_up;  // outputs: twice the inner width
    Shape down;     // inputs: the inner width, a multiple of 16
    Gate gate = Gate::silu;
};

// Throws std::invalid_argument naming what does not fit, and what is allowed.
void check(const Mlp& mlp);

//   gate_up, down   tiles, aligned to `tile_alignment`
//   x               float [rows, gate_up.inputs]
//   y               float [rows, down.outputs]
// Safe to call from several threads at once.
void gated_mlp(const Mlp& mlp, const std::uint8_t* gate_up, const std::uint8_t* down,
               const float* x, std::int64_t rows, float* y, const Parallel& parallel);

}  // namespace tidegate::native
