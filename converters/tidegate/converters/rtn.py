"""Round to nearest: the quantiser that needs no data.

Each group of `group_size` inputs gets its own scale, rounded to float16 first so that every
backend multiplies by the same number. Asymmetric groups span their minimum and maximum, both
widened to include 0; symmetric ones span the largest magnitude around the middle value.
"""

from __future__ import annotations

import numpy as np

from tidegate.errors import ConversionError
from tidegate.model.packed import Array, Bits, Bytes, DenseLinear, PackedLinear, pack_nibbles

GROUP_SIZES = (32, 64, 128)
"""What every backend runs fast; a whole row (`group_size=None`) is allowed too, for 8 bits."""

_SMALLEST_SCALE = np.float32(2.0**-24)
"""The least positive float16; an all-zero group must not divide by zero."""


def quantise(
    linear: DenseLinear, *, bits: Bits, group_size: int | None, symmetric: bool
) -> PackedLinear:
    """Quantise a weight [out, in] by rounding to nearest.

    Args:
        linear: the weight; its bias is kept as it is.
        bits: 4 or 8.
        group_size: inputs that share a scale: 32, 64 or 128, or None for the whole row. An input
            that does not fill its last group is padded with the zero-point.
        symmetric: one zero-point in the middle for all, instead of one per group.

    Raises:
        ConversionError: the group size is not one of those, or the weight is not finite.
    """
    if group_size is not None and group_size not in GROUP_SIZES:
        raise ConversionError(f"group_size = {group_size}: must be one of {GROUP_SIZES}")
    weight = linear.weight
    if not np.isfinite(weight).all():
        raise ConversionError("the weight holds infinite or undefined values")
    size = group_size or linear.inputs
    groups = -(-linear.inputs // size)
    padded = np.pad(weight, ((0, 0), (0, groups * size - linear.inputs)))
    grouped = padded.reshape(linear.outputs, groups, size)
    scales, zeros = _symmetric(grouped, bits) if symmetric else _asymmetric(grouped, bits)
    middle = np.float32(1 << (bits - 1)) if zeros is None else zeros[..., None]
    quotient = np.rint(grouped / scales[..., None]) + middle
    values = np.clip(quotient, 0, (1 << bits) - 1).astype(np.uint8)
    return PackedLinear(
        values=pack_nibbles(values) if bits == 4 else values,
        scales=scales,
        zeros=zeros,
        bias=linear.bias,
        inputs=linear.inputs,
        bits=bits,
        group_size=size,
    )


def _half(scales: Array) -> Array:
    """Scales as a bundle stores them: float16 precision, never 0 or infinite."""
    limited = np.clip(scales, _SMALLEST_SCALE, np.float32(np.finfo(np.float16).max))
    return limited.astype(np.float16).astype(np.float32)


def _asymmetric(grouped: Array, bits: Bits) -> tuple[Array, Bytes]:
    low = np.minimum(grouped.min(axis=-1), 0)
    high = np.maximum(grouped.max(axis=-1), 0)
    top = np.float32((1 << bits) - 1)
    scales = _half((high - low) / top)
    zeros = np.clip(np.rint(-low / scales), 0, top).astype(np.uint8)
    return scales, zeros


def _symmetric(grouped: Array, bits: Bits) -> tuple[Array, None]:
    """Scale by the largest magnitude over 2 ** (bits - 1) - 1, so that both ends are reached."""
    magnitude = np.abs(grouped).max(axis=-1)
    return _half(magnitude / np.float32((1 << (bits - 1)) - 1)), None
