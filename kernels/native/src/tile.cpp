// Shapes, and the one layout of tiled weights.
#include <cstring>
#include <stdexcept>

#include "tile.h"

namespace tidegate::native {
namespace {

constexpr std::int64_t largest_side = std::int64_t{1} << 31;

void require(bool holds, const char* field, std::int64_t value, const char* allowed) {
    if (!holds) {
        throw std::invalid_argument(std::string(field) + " = " + std::to_string(value) +
                                    ": must be " + allowed);
    }
}

std::uint8_t element(const std::uint8_t* packed, std::int64_t index, std::int32_t bits) {
    if (bits == 8) {
        return packed[index];
    }
    const std::uint8_t pair = packed[index / 2];
    return index % 2 == 0 ? pair & 15 : pair >> 4;
}

// The low four nibbles of `word`, one to a byte.
std::uint32_t spread(std::uint32_t word) {
    word = (word | word << 8) & 0x00ff00ffu;
    return (word | word << 4) & 0x0f0f0f0fu;
}

// One row's group as it lies in a record: `values` points at the row's first byte.
void place_values(const Shape& shape, const std::uint8_t* packed, std::uint8_t* values) {
    for (std::int32_t byte = 0; byte < shape.group * shape.bits / 8; byte += 4, values += 64) {
        if (shape.bits == 8) {
            std::memcpy(values, packed + byte, 4);
            continue;
        }
        // Of eight inputs, 0-3 go to the low nibbles of four bytes and 4-7 to the high.
        const std::uint32_t first = packed[byte] | packed[byte + 1] << 8;
        const std::uint32_t second = packed[byte + 2] | packed[byte + 3] << 8;
        const std::uint32_t quads = spread(first) | spread(second) << 4;
        for (std::int32_t i = 0; i < 4; ++i) {
            values[i] = static_cast<std::uint8_t>(quads >> (8 * i));
        }
    }
}

}  // namespace

void check(const Shape& shape) {
    require(shape.inputs > 0 && shape.inputs < largest_side, "inputs", shape.inputs,
            "1 to 2147483647");
    require(shape.outputs > 0 && shape.outputs < largest_side, "outputs", shape.outputs,
            "1 to 2147483647");
    require(shape.bits == 4 || shape.bits == 8, "bits", shape.bits, "4 or 8");
    require(shape.group > 0 && shape.group % 16 == 0 && shape.group <= (1 << 24), "group",
            shape.group, "a multiple of 16, at most 16777216");
}

std::int64_t groups(const Shape& shape) {
    return (shape.inputs + shape.group - 1) / shape.group;
}

std::int32_t activation_group(const Shape& shape) {
    for (std::int32_t width : {64, 48, 32}) {
        if (shape.group % width == 0) {
            return width;
        }
    }
    return 16;
}

std::size_t record_bytes(const Shape& shape) {
    const auto values = static_cast<std::size_t>(shape.group) * 2 * shape.bits;
    return tile_outputs * (sizeof(std::uint16_t) + (shape.zeros ? 1 : 0)) + values;
}

std::size_t tile_bytes(const Shape& shape) {
    const std::size_t bytes = static_cast<std::size_t>(groups(shape)) * record_bytes(shape);
    return (bytes + tile_alignment - 1) / tile_alignment * tile_alignment;
}

std::size_t tiled_bytes(const Shape& shape) {
    check(shape);
    const std::int64_t tiles = (shape.outputs + tile_outputs - 1) / tile_outputs;
    return static_cast<std::size_t>(tiles) * tile_bytes(shape);
}

void tile(const Shape& shape, const std::uint8_t* values, const std::uint16_t* scales_f16,
          const std::uint8_t* packed_zeros, std::uint8_t* out) {
    std::memset(out, 0, tiled_bytes(shape));
    if (shape.zeros != (packed_zeros != nullptr)) {
        throw std::invalid_argument("packed_zeros: must be given if, and only if, shape.zeros");
    }
    const std::int64_t count = groups(shape);
    const std::int64_t group_bytes = std::int64_t{shape.group} * shape.bits / 8;
    const std::int64_t zeros_bytes = (count * shape.bits + 7) / 8;
    const std::size_t scale_bytes = tile_outputs * sizeof(std::uint16_t);
    for (std::int64_t output = 0; output < shape.outputs; ++output) {
        const std::size_t lane = static_cast<std::size_t>(output % tile_outputs);
        std::uint8_t* record =
            out + static_cast<std::size_t>(output / tile_outputs) * tile_bytes(shape);
        for (std::int64_t g = 0; g < count; ++g, record += record_bytes(shape)) {
            std::memcpy(record + lane * 2, &scales_f16[output * count + g], 2);
            std::uint8_t* place = record + scale_bytes;
            if (shape.zeros) {
                place[lane] = element(packed_zeros + output * zeros_bytes, g, shape.bits);
                place += tile_outputs;
            }
            place_values(shape, values + (output * count + g) * group_bytes, place + lane * 4);
        }
    }
}

}  // namespace tidegate::native
