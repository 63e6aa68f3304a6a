// The definition of correct, in plain C++: every other path is tested against it bit for bit.
#include <math.h>
#include <string.h>

#include "gate.h"
#include "kernel.h"

namespace tidegate::native {
namespace {

constexpr int lanes = 16;

float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half >> 15) << 31;
    const uint32_t exponent = (half >> 10) & 31;
    const uint32_t mantissa = half & 1023;
    if (exponent == 0) {
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    const uint32_t bits = sign | (wide << 23) | (mantissa << 13);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Round half to even for |value| < 2^22, in the default rounding mode.
int32_t round_even(float value) {
    const float shifted = value + 0x1.8p23f;
    return static_cast<int32_t>(shifted - 0x1.8p23f);
}

// The bits of |value|: ordered as the magnitudes are, with infinity and then NaN above all.
int32_t magnitude_bits(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7fffffff;
}

void quantise_group(const float* x, int count, float* scale, int8_t* values, int32_t* sum) {
    int32_t largest = 0;
    for (int i = 0; i < count; ++i) {
        const int32_t bits = magnitude_bits(x[i]);
        largest = bits > largest ? bits : largest;
    }
    *scale = 0.0f;
    *sum = 0;
    float magnitude;
    memcpy(&magnitude, &largest, sizeof magnitude);
    if (largest >= 0x7f800000) {
        *scale = NAN;
    } else if (magnitude >= smallest_activation) {
        *scale = magnitude / 127.0f;
        const float inverse = 127.0f / magnitude;
        for (int i = 0; i < count; ++i) {
            values[i] = static_cast<int8_t>(round_even(x[i] * inverse));
            *sum += values[i];
        }
    }
}

void quantise(const Weight& weight, const float* x, int64_t inputs, const Block& block,
              int32_t row) {
    const int64_t act_groups = weight.groups * weight.per_group;
    for (int64_t g = 0; g < act_groups; ++g) {
        const int64_t first = g * weight.act_group;
        int64_t count = inputs - first;
        count = count < 0 ? 0 : count > weight.act_group ? weight.act_group : count;
        int8_t values[64] = {};
        int32_t sum = 0;
        float scale = 0.0f;
        quantise_group(x + (count > 0 ? first : 0), static_cast<int>(count), &scale, values, &sum);
        block.scales[g * block.rows + row] = scale;
        block.sums[g * block.rows + row] = -sum;
        for (int i = 0; i < weight.act_group; i += 4) {
            memcpy(block.values + ((first + i) / 4 * block.rows + row) * 4, values + i, 4);
        }
    }
}

// sum of value * q over one activation group, for the 16 rows of a tile.
void dot(const Weight& weight, const uint8_t* values, const Block& block, int64_t first,
         int32_t row, int32_t* sums) {
    for (int i = 0; i < weight.act_group; ++i) {
        const int8_t q = block.values[((first + i) / 4 * block.rows + row) * 4 + i % 4];
        const bool four = weight.bits == 4;
        const uint8_t* vector = values + 64 * (four ? i / 8 : i / 4);
        for (int lane = 0; lane < lanes; ++lane) {
            const uint8_t byte = vector[lane * 4 + i % 4];
            const uint8_t value = !four ? byte : i % 8 < 4 ? byte & 15 : byte >> 4;
            sums[lane] += value * q;
        }
    }
}

void tile_row(const Weight& weight, const uint8_t* record, const Block& block, int32_t row,
              float* y) {
    for (int lane = 0; lane < lanes; ++lane) {
        y[lane] = 0.0f;
    }
    const int32_t middle = weight.bits == 4 ? 8 : 128;
    const int header = lanes * (weight.zeros ? 3 : 2);
    for (int64_t g = 0; g < weight.groups; ++g, record += weight.record_bytes) {
        for (int32_t part = 0; part < weight.per_group; ++part) {
            const int64_t act = g * weight.per_group + part;
            int32_t sums[lanes] = {};
            const uint8_t* values = record + header + part * weight.act_group * 2 * weight.bits;
            dot(weight, values, block, act * weight.act_group, row, sums);
            const int32_t minus = block.sums[act * block.rows + row];
            for (int lane = 0; lane < lanes; ++lane) {
                uint16_t half;
                memcpy(&half, record + lane * 2, 2);
                const int32_t zero = weight.zeros ? record[lanes * 2 + lane] : middle;
                const float scale = half_to_float(half) * block.scales[act * block.rows + row];
                y[lane] = fmaf(static_cast<float>(sums[lane] + zero * minus), scale, y[lane]);
            }
        }
    }
}

void multiply(const Weight& weight, const Block& block, int64_t first, int64_t last, float* y,
              int64_t stride) {
    for (int64_t tile = first; tile < last; ++tile) {
        for (int32_t row = 0; row < block.rows; ++row) {
            tile_row(weight, weight.tiles + tile * weight.tile_bytes, block, row,
                     y + row * stride + tile * lanes);
        }
    }
}

}  // namespace

const Kernel portable_kernel = {"portable", most_block_rows, 1, quantise, multiply, gate_rows};

}  // namespace tidegate::native
