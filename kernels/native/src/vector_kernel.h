// The kernel of every vector path: one order of work, over the instructions that `Isa` names.
//
// Included by one translation unit per instruction set, each with flags of its own; everything is
// in an unnamed namespace so that no two of them share a function. `Isa` has:
//
//     lanes                  int32 (and float) lanes of a vector: 16, 8 or 4
//     rows, tiles            the most rows of a block, and the tiles that one pass holds
//     Ints, Floats           vectors; splat, zero_floats, store
//     scales_of, zero_points the lanes' scales and zero-points, from a record
//     minus_sums             zero-points times minus the sum of the activations
//     dot_group              sums of value * q; `dot_quads` is the usual way, over load, low, high,
//                            splat_quad and dot
//     to_float, multiply, fused
//     largest_magnitude, round_quads   for quantising a row
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "gate.h"
#include "kernel.h"

#if defined(__clang__)
#define TIDEGATE_UNROLL _Pragma("unroll")
#else
#define TIDEGATE_UNROLL _Pragma("GCC unroll 64")
#endif

namespace tidegate::native {
namespace {

constexpr int tile_lanes = 16;

// Where the vectors of a group of `Tiles` tiles lie.
template <int Tiles>
struct Records {
    const uint8_t* first;
    size_t tile_bytes;

    const uint8_t* of(int tile) const { return first + static_cast<size_t>(tile) * tile_bytes; }
};

// sums[row][vector] += value * q over one activation group, for instruction sets that add four
// products of bytes into each int32 lane. `q` is [inputs / 4][Rows][4].
template <class Isa, int Bits, int Rows, int Tiles>
inline void dot_quads(typename Isa::Ints (&sums)[Rows][Tiles * tile_lanes / Isa::lanes],
                      const Records<Tiles>& values, const int8_t* q, int inputs) {
    constexpr int parts = tile_lanes / Isa::lanes;
    constexpr int vectors = Tiles * parts;
    const int step = Bits == 4 ? 8 : 4;
    const int8_t* end = q + static_cast<size_t>(inputs) * Rows;
    size_t offset = 0;
    // At least once, which spares the compiler a copy of every sum for the loop that never ran.
    do {
        typename Isa::Ints packed[vectors];
        typename Isa::Ints low[vectors];
        TIDEGATE_UNROLL
        for (int v = 0; v < vectors; ++v) {
            packed[v] = Isa::load(values.of(v / parts) + offset + v % parts * Isa::lanes * 4);
            low[v] = Isa::template low<Bits>(packed[v]);
        }
        TIDEGATE_UNROLL
        for (int row = 0; row < Rows; ++row) {
            const typename Isa::Ints a = Isa::splat_quad(q + row * 4);
            TIDEGATE_UNROLL
            for (int v = 0; v < vectors; ++v) {
                sums[row][v] = Isa::template dot<Bits>(sums[row][v], low[v], a);
            }
        }
        if (Bits == 4) {
            TIDEGATE_UNROLL
            for (int v = 0; v < vectors; ++v) {
                low[v] = Isa::high(packed[v]);
            }
            TIDEGATE_UNROLL
            for (int row = 0; row < Rows; ++row) {
                const typename Isa::Ints a = Isa::splat_quad(q + (Rows + row) * 4);
                TIDEGATE_UNROLL
                for (int v = 0; v < vectors; ++v) {
                    sums[row][v] = Isa::template dot<Bits>(sums[row][v], low[v], a);
                }
            }
        }
        offset += 64;
        q += Rows * step;
    } while (q != end);
}

// `Tiles` tiles, from `tile` on, for the `Rows` rows of a block. Weights are fetched `ahead` bytes
// before they are read.
template <class Isa, int Bits, bool Zeros, int Rows, int Tiles>
void multiply_panel(const Weight& weight, const Block& block, const uint8_t* tile, size_t ahead,
                    float* y, int64_t stride) {
    constexpr int parts = tile_lanes / Isa::lanes;
    constexpr int vectors = Tiles * parts;
    constexpr int header = tile_lanes * (Zeros ? 3 : 2);
    typename Isa::Floats totals[Rows][vectors];
    for (auto& row : totals) {
        for (auto& total : row) {
            total = Isa::zero_floats();
        }
    }
    const int8_t* q = block.values;
    const float* row_scales = block.scales;
    const int32_t* row_sums = block.sums;
    const int32_t value_bytes = weight.act_group * 2 * Bits;
    for (int64_t g = 0; g < weight.groups; ++g, tile += weight.record_bytes) {
        Records<Tiles> at{tile, weight.tile_bytes};
        typename Isa::Floats scales[vectors];
        typename Isa::Ints zeros[vectors];
        TIDEGATE_UNROLL
        for (int v = 0; v < vectors; ++v) {
            const uint8_t* record = at.of(v / parts);
            const int lane = v % parts * Isa::lanes;
            scales[v] = Isa::scales_of(record + lane * 2);
            zeros[v] = Isa::template zero_points<Bits, Zeros>(record + tile_lanes * 2 + lane);
        }
        for (size_t line = 0; line < weight.record_bytes; line += 64) {
            TIDEGATE_UNROLL
            for (int t = 0; t < Tiles; ++t) {
                // Into the second level: the first has no room for so much beside activations.
                __builtin_prefetch(at.of(t) + line + ahead, 0, 2);
            }
        }
        at.first += header;
        for (int32_t part = 0; part < weight.per_group; ++part) {
            typename Isa::Ints sums[Rows][vectors];
            TIDEGATE_UNROLL
            for (int row = 0; row < Rows; ++row) {
                const typename Isa::Ints minus = Isa::splat(row_sums[row]);
                TIDEGATE_UNROLL
                for (int v = 0; v < vectors; ++v) {
                    sums[row][v] = Isa::minus_sums(zeros[v], minus);
                }
            }
            Isa::template dot_group<Bits, Rows, Tiles>(sums, at, q, weight.act_group);
            TIDEGATE_UNROLL
            for (int row = 0; row < Rows; ++row) {
                const typename Isa::Floats scale = Isa::splat(row_scales[row]);
                TIDEGATE_UNROLL
                for (int v = 0; v < vectors; ++v) {
                    totals[row][v] = Isa::fused(Isa::to_float(sums[row][v]),
                                                Isa::multiply(scales[v], scale), totals[row][v]);
                }
            }
            at.first += value_bytes;
            q += static_cast<size_t>(weight.act_group) * Rows;
            row_scales += Rows;
            row_sums += Rows;
        }
    }
    for (int row = 0; row < Rows; ++row) {
        for (int v = 0; v < vectors; ++v) {
            Isa::store(y + row * stride + v * Isa::lanes, totals[row][v]);
        }
    }
}

// How far ahead to fetch: the next panel, unless so much would push out what is in use.
inline size_t fetch_ahead(size_t panel_bytes) {
    return panel_bytes <= (size_t{1} << 18) ? panel_bytes : 4096;
}

template <class Isa, int Bits, bool Zeros, int Rows>
void multiply_rows(const Weight& weight, const Block& block, int64_t first, int64_t last, float* y,
                   int64_t stride) {
    constexpr int most = Isa::tiles;
    const uint8_t* tile = weight.tiles + static_cast<size_t>(first) * weight.tile_bytes;
    const size_t panel_bytes = most * weight.tile_bytes;
    y += first * tile_lanes;
    for (; first + most <= last; first += most) {
        // The last panel fetches itself, which costs nothing, and not what another thread reads.
        const size_t ahead = first + most < last ? fetch_ahead(panel_bytes) : 0;
        multiply_panel<Isa, Bits, Zeros, Rows, most>(weight, block, tile, ahead, y, stride);
        tile += panel_bytes;
        y += most * tile_lanes;
    }
    for (; first < last; ++first) {
        multiply_panel<Isa, Bits, Zeros, Rows, 1>(weight, block, tile, 0, y, stride);
        tile += weight.tile_bytes;
        y += tile_lanes;
    }
}

template <class Isa, int Bits, bool Zeros, int Rows = Isa::rows>
void multiply_block(const Weight& weight, const Block& block, int64_t first, int64_t last,
                    float* y, int64_t stride) {
    if (block.rows == Rows) {
        multiply_rows<Isa, Bits, Zeros, Rows>(weight, block, first, last, y, stride);
    } else if constexpr (Rows > 1) {
        multiply_block<Isa, Bits, Zeros, Rows - 1>(weight, block, first, last, y, stride);
    }
}

template <class Isa>
void multiply(const Weight& weight, const Block& block, int64_t first, int64_t last, float* y,
              int64_t stride) {
    if (weight.bits == 4) {
        (weight.zeros ? multiply_block<Isa, 4, true> : multiply_block<Isa, 4, false>)(
            weight, block, first, last, y, stride);
    } else {
        (weight.zeros ? multiply_block<Isa, 8, true> : multiply_block<Isa, 8, false>)(
            weight, block, first, last, y, stride);
    }
}

// One row, as in portable.cpp, sixteen activations at a time. The last inputs go through a buffer.
template <class Isa>
void quantise(const Weight& weight, const float* x, int64_t inputs, const Block& block,
              int32_t row) {
    const int64_t act_groups = weight.groups * weight.per_group;
    int8_t* q = block.values + row * 4;
    const size_t stride = static_cast<size_t>(block.rows) * 4;
    for (int64_t g = 0; g < act_groups; ++g) {
        const int64_t first = g * weight.act_group;
        float tail[64] = {};
        const float* from = tail;
        if (first + weight.act_group <= inputs) {
            from = x + first;
        } else if (first < inputs) {
            memcpy(tail, x + first, static_cast<size_t>(inputs - first) * sizeof(float));
        }
        const int32_t largest = Isa::largest_magnitude(from, weight.act_group);
        float magnitude;
        memcpy(&magnitude, &largest, sizeof magnitude);
        float scale = magnitude / 127.0f;
        float inverse = 127.0f / magnitude;
        if (largest >= 0x7f800000 || !(magnitude >= smallest_activation)) {
            scale = largest >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
            memset(tail, 0, sizeof tail);
            from = tail;
            inverse = 0.0f;
        }
        const int32_t sum = Isa::round_quads(from, inverse, weight.act_group, q, stride);
        block.scales[g * block.rows + row] = scale;
        block.sums[g * block.rows + row] = -sum;
        q += static_cast<size_t>(weight.act_group) / 4 * stride;
    }
}

}  // namespace
}  // namespace tidegate::native
