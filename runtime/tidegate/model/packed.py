"""`PackedLinear`: the one quantised weight; every quantiser makes it, every backend reads it.

Values are unsigned, grouped along the input, and packed low nibble first at 4 bits, so a backend
can be compared with another on the same integers. Layouts:

    values      uint8 [out, groups, group_size * bits / 8]
    scales      float32 [out, groups], already rounded to float16 precision
    zeros       uint8 [out, groups] unpacked, or None when symmetric (then 2 ** (bits - 1))
    w[o, i]   = (value - zero) * scale

An input that does not fill its last group is padded; `inputs` keeps the true number, and the
padding holds the zero-point so that it contributes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Bits = Literal[4, 8]
Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def pack_nibbles(values: Bytes) -> Bytes:
    """Pack 4-bit values along the last axis, low nibble first; an odd tail is padded with 0."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    low, high = values[..., 0::2], values[..., 1::2]
    return np.bitwise_or(low, np.left_shift(high, 4, dtype=np.uint8), dtype=np.uint8)


def unpack_nibbles(packed: Bytes, count: int) -> Bytes:
    """Undo `pack_nibbles`: the first `count` values of the last axis."""
    values = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    values[..., 0::2] = packed & 15
    values[..., 1::2] = packed >> 4
    return values[..., :count]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLinear:
    """A linear layer's weight at 4 or 8 bits; see the module for the layout."""

    values: Bytes
    scales: Array
    zeros: Bytes | None
    bias: Array | None = None
    inputs: int
    bits: Bits
    group_size: int

    def __post_init__(self) -> None:
        outputs, groups, row_bytes = self.values.shape
        expected = (outputs, groups)
        if row_bytes * 8 != self.group_size * self.bits:
            raise ValueError(
                f"values: {row_bytes} bytes a group, not {self.group_size}x{self.bits} bits"
            )
        if not (groups - 1) * self.group_size < self.inputs <= groups * self.group_size:
            raise ValueError(
                f"inputs = {self.inputs}: must fill {groups} groups of {self.group_size}"
            )
        if self.scales.shape != expected or (
            self.zeros is not None and self.zeros.shape != expected
        ):
            raise ValueError(f"scales and zeros must have shape {expected}")
        if self.bias is not None and self.bias.shape != (outputs,):
            raise ValueError(f"bias: shape {self.bias.shape}: must be ({outputs},)")

    @property
    def outputs(self) -> int:
        """Rows of the weight."""
        return int(self.values.shape[0])

    @property
    def groups(self) -> int:
        """Groups along the input."""
        return int(self.values.shape[1])

    @property
    def symmetric_zero(self) -> int:
        """The zero-point of a symmetric weight, 8 or 128."""
        return 1 << (self.bits - 1)

    @property
    def nbytes(self) -> int:
        """Bytes of values, float16 scales and packed zero-points, as a bundle stores them."""
        zeros = 0 if self.zeros is None else self.outputs * -(-self.groups * self.bits // 8)
        return int(self.values.nbytes + self.scales.size * 2 + zeros)

    def integers(self) -> Bytes:
        """The unsigned integers, [out, groups, group_size], one byte each."""
        return unpack_nibbles(self.values, self.group_size) if self.bits == 4 else self.values

    def packed_zeros(self) -> Bytes | None:
        """Zero-points [out, ceil(groups * bits / 8)], low nibble first; None if symmetric."""
        if self.zeros is None:
            return None
        return pack_nibbles(self.zeros) if self.bits == 4 else self.zeros

    def dequantise(self) -> Array:
        """The weight the integers stand for, float32 [out, inputs]."""
        zeros = np.float32(self.symmetric_zero) if self.zeros is None else self.zeros[..., None]
        weight = (self.integers().astype(np.float32) - zeros) * self.scales[..., None]
        return weight.reshape(self.outputs, -1)[:, : self.inputs]


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseLinear:
    """A linear layer's weight as it is in the checkpoint, widened to float32 [out, inputs]."""

    weight: Array
    bias: Array | None = None

    @property
    def outputs(self) -> int:
        """Rows of the weight."""
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        """Columns of the weight."""
        return int(self.weight.shape[1])


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRankLinear:
    """A linear layer as the product of two smaller ones: `second(first(x))`.

    `first` is [rank, in] and has no bias; `second` is [out, rank] and has the layer's.
    """

    first: PackedLinear | DenseLinear
    second: PackedLinear | DenseLinear

    def __post_init__(self) -> None:
        if self.first.outputs != self.second.inputs or self.first.bias is not None:
            raise ValueError(
                f"first gives {self.first.outputs} values, second takes {self.second.inputs}, and "
                "only second may have a bias"
            )

    @property
    def outputs(self) -> int:
        """Rows of the weight that the two stand for."""
        return self.second.outputs

    @property
    def inputs(self) -> int:
        """Columns of the weight that the two stand for."""
        return self.first.inputs

    @property
    def bias(self) -> Array | None:
        """The layer's bias."""
        return self.second.bias


Linear = PackedLinear | DenseLinear | LowRankLinear


def dense_weight(linear: Linear) -> Array:
    """The weight that a linear layer stands for, float32 [out, in]."""
    match linear:
        case PackedLinear():
            return linear.dequantise()
        case DenseLinear():
            return linear.weight
        case LowRankLinear():
            product: Array = dense_weight(linear.second) @ dense_weight(linear.first)
            return product
