// Sizes of the tile layout that only this library's own parts need.
#pragma once

#include "packed_linear.h"

namespace tidegate::native {

// Bytes of one group's record in a tile, and of a whole tile.
std::size_t record_bytes(const Shape& shape);
std::size_t tile_bytes(const Shape& shape);

}  // namespace tidegate::native
