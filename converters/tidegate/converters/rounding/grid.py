"""The grid a group of weights is rounded to: its scale, its zero-point, and the rounding.

Groups are [rows, groups, group_size] throughout, scales and zero-points [rows, groups]. Scales are
rounded to float16 before anything is divided by them, so that every backend multiplies by the
number that was rounded for. A quantiser works on a few rows at a time: every array here is then
small enough to stay in a core's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tidegate.errors import ConversionError
from tidegate.model.packed import Array, Bits, Bytes, pack_nibbles

_SMALLEST_SCALE = np.float32(2.0**-24)
"""The least positive float16; an all-zero group must not divide by zero."""

_LARGEST_SCALE = np.float32(np.finfo(np.float16).max)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Grid:
    """The values a group can take: `(integer - zero) * scale`, integers from 0 to 2 ** bits - 1."""

    scales: Array
    zeros: Bytes | None
    """None when symmetric: the middle, 2 ** (bits - 1), for all."""
    bits: Bits

    @property
    def top(self) -> np.float32:
        """The largest integer."""
        return np.float32((1 << self.bits) - 1)

    @property
    def centre(self) -> Array | np.float32:
        """The zero-points as floats that broadcast over the groups' values."""
        if self.zeros is None:
            return np.float32(1 << (self.bits - 1))
        return self.zeros.astype(np.float32)[..., None]


def span(grouped: Array) -> tuple[Array, Array]:
    """Least and greatest value of every group, both widened to include 0.

    Raises:
        ConversionError: a value is infinite or undefined.
    """
    flat, size = grouped.reshape(-1), grouped.shape[-1]
    # Twice as fast as a reduction over the last axis, which is as short as a group.
    starts = np.arange(0, flat.size, size)
    low = np.minimum(np.minimum.reduceat(flat, starts), 0).reshape(grouped.shape[:-1])
    high = np.maximum(np.maximum.reduceat(flat, starts), 0).reshape(grouped.shape[:-1])
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ConversionError("the weight holds infinite or undefined values")
    return low, high


def make_grid(low: Array, high: Array, bits: Bits, *, symmetric: bool) -> Grid:
    """The grid from `low` <= 0 to `high` >= 0.

    A symmetric one takes the larger magnitude over 2 ** (bits - 1) - 1, so that both ends are
    reached.
    """
    if symmetric:
        reach: Array = np.maximum(high, -low)
        scales = _half(reach / np.float32((1 << (bits - 1)) - 1))
        return Grid(scales=scales, zeros=None, bits=bits)
    top = np.float32((1 << bits) - 1)
    scales = _half((high - low) / top)
    zeros = np.clip(np.rint(-low / scales), 0, top).astype(np.uint8)
    return Grid(scales=scales, zeros=zeros, bits=bits)


def round_to(grouped: Array, grid: Grid) -> Array:
    """The integer of every value, as float32."""
    steps = grouped / grid.scales[..., None]
    np.rint(steps, out=steps)
    steps += grid.centre
    return np.clip(steps, 0, grid.top, out=steps)


def packed(integers: Array, bits: Bits) -> Bytes:
    """Integers as `PackedLinear.values`: bytes, or nibbles low first."""
    values = integers.astype(np.uint8)
    if bits == 8 or values.shape[-1] % 2:
        return values if bits == 8 else pack_nibbles(values)
    # Read as low | high << 8, of which the low byte is kept in the end: six times as fast.
    pairs: npt.NDArray[np.uint16] = values.view("<u2")
    return (pairs >> 4 | pairs).astype(np.uint8)


def _half(scales: Array) -> Array:
    """Scales as a bundle stores them: float16 precision, never 0 or infinite."""
    limited = np.clip(scales, _SMALLEST_SCALE, _LARGEST_SCALE)
    return limited.astype(np.float16).astype(np.float32)
