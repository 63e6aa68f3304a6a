"""Round to nearest: the quantiser that needs no data.

Each group of `group_size` inputs gets its own grid (`rounding.grid`). Asymmetric groups
span their minimum and maximum, symmetric ones the largest magnitude; with `clip` a group may span
less where that lowers its squared error.

Rows are independent, so they are packed a few at a time by a few threads, and may be read only
then: beside the result it takes some MiB, however large the weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tidegate.converters.rounding.clip import search
from tidegate.converters.rounding.grid import make_grid, packed, round_to, span
from tidegate.errors import ConversionError
from tidegate.model.packed import Array, Bits, Bytes, DenseLinear, PackedLinear

GROUP_SIZES = (32, 64, 128)
"""What every backend runs fast; a whole row (`group_size=None`) is allowed too, for 8 bits."""

Rows = Callable[[int, int], Array]
"""Gives rows `first` up to, without, `after` of a weight, float32; called by several threads."""

_CHUNK_VALUES = 1 << 18
"""A MiB of float32, found by trying: less is all overhead, more leaves a core's cache."""

_MOST_THREADS = 4
"""More would wait for memory, and each has a chunk of its own."""


def quantise(
    linear: DenseLinear,
    *,
    bits: Bits,
    group_size: int | None,
    symmetric: bool,
    clip: bool = False,
    importance: Array | None = None,
) -> PackedLinear:
    """Quantise a weight [out, in] by rounding to nearest.

    Args:
        linear: the weight; its bias is kept as it is.
        bits: 4 or 8.
        group_size: inputs that share a scale: 32, 64 or 128, or None for the whole row. An input
            that does not fill its last group is padded with the zero-point.
        symmetric: one zero-point in the middle for all, instead of one per group.
        clip: search every group's span for the least squared error; several times as slow.
        importance: [in], how much an error of that input counts in the search: the mean square
            of its activations. All alike when None.

    Raises:
        ConversionError: the group size is not one of those, the weight is not finite, or the
            importance is not one number of at least 0 for each input.
    """
    weight = linear.weight
    return quantise_rows(
        lambda first, after: weight[first:after],
        (linear.outputs, linear.inputs),
        bias=linear.bias,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        clip=clip,
        importance=importance,
    )


def quantise_rows(
    read: Rows,
    shape: tuple[int, int],
    *,
    bits: Bits,
    group_size: int | None,
    symmetric: bool,
    bias: Array | None = None,
    clip: bool = False,
    importance: Array | None = None,
) -> PackedLinear:
    """`quantise` for a weight of `shape` [out, in] that is read a few rows at a time.

    Raises:
        ConversionError: as `quantise`. What `read` raises passes through.
    """
    outputs, inputs = shape
    if group_size is not None and group_size not in GROUP_SIZES:
        raise ConversionError(f"group_size = {group_size}: must be one of {GROUP_SIZES}")
    size = group_size or inputs
    groups = -(-inputs // size)
    weights = None if importance is None else _checked(importance, inputs, groups * size)
    rounding = _Rounding(
        bits=bits,
        symmetric=symmetric,
        clip=clip,
        importance=None if weights is None else weights.reshape(groups, size),
    )
    result = PackedLinear(
        values=np.empty((outputs, groups, -(-size * bits // 8)), np.uint8),
        scales=np.empty((outputs, groups), np.float32),
        zeros=None if symmetric else np.empty((outputs, groups), np.uint8),
        bias=bias,
        inputs=inputs,
        bits=bits,
        group_size=size,
    )
    step = max(_CHUNK_VALUES // (groups * size), 1)

    def pack(first: int) -> None:
        rows = slice(first, min(first + step, outputs))
        grouped = _grouped(read(rows.start, rows.stop), groups, size)
        values, scales, zeros = rounding(grouped)
        result.values[rows], result.scales[rows] = values, scales
        if result.zeros is not None and zeros is not None:
            result.zeros[rows] = zeros

    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
        for _ in pool.map(pack, range(0, outputs, step)):
            pass  # raises what a chunk raised, and drops the chunks after it
    return result


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rounding:
    """How the groups of some rows become integers, scales and zero-points."""

    bits: Bits
    symmetric: bool
    clip: bool
    importance: Array | None

    def __call__(self, grouped: Array) -> tuple[Bytes, Array, Bytes | None]:
        # Weights near the end of float32 overflow on the way to the largest scale there is.
        with np.errstate(over="ignore"):
            low, high = span(grouped)
            if self.clip:
                grid = search(
                    grouped,
                    (low, high),
                    self.bits,
                    symmetric=self.symmetric,
                    importance=self.importance,
                )
            else:
                grid = make_grid(low, high, self.bits, symmetric=self.symmetric)
            return packed(round_to(grouped, grid), self.bits), grid.scales, grid.zeros


def _grouped(rows: Array, groups: int, size: int) -> Array:
    """Rows [n, in] as [n, groups, size], the last group filled with zeros."""
    missing = groups * size - rows.shape[1]
    padded = np.pad(rows, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(rows)
    return padded.reshape(len(rows), groups, size)


def _checked(importance: Array, inputs: int, columns: int) -> Array:
    """The importance of every column; the padding has none."""
    if importance.shape != (inputs,):
        raise ConversionError(f"importance: shape {importance.shape}: must be ({inputs},)")
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise ConversionError("importance: must be finite and at least 0")
    return np.pad(importance, (0, columns - inputs))
