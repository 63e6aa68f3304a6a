"""Weights of linear layers on a GPU: dense, or integers in the order tensor cores read them.

`TiledLinear` holds 4- or 8-bit integers in tiles of 64 outputs by `step` inputs, where `step` is
16, 32, 64 or 128 and divides the group size, so a tile has one scale for each of its rows. Inside
a tile the integers are in the order of the registers of a matrix instruction's left operand (PTX
ISA, mma.m16n8k16 and wgmma.m64k16, A in registers): a thread that loads 16 bytes holds what its
own registers must hold and widens it in place; nothing is exchanged between threads. With row
m = m5..m0 and input k = k6..k0 in binary, a 32-bit word is at

    4 bits: word  [k6, m5 m4, m2 m1 m0, k2 k1, k5 k4]   nibble [k0, k3, m3]
    8 bits: word  [k6 k5, m5 m4, m2 m1 m0, k2 k1, k4, k3]   byte [k0, m3]

most significant bit first; bits that a smaller `step` does not have are left out. Two integers of
one register (k0) are 16 bits apart, so one shift and one mask widen both. Scales and zero-points
are float16 pairs in 32-bit words, row m3 = 0 in the low half: [m5 m4 m2 m1 m0].

Outputs are padded to 64 with scale 0 and inputs to `step`; the padding contributes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch

from tidegate.kernels.linear.int8 import Int8Linear

Tensor = torch.Tensor
Bits = Literal[4, 8]

TILE_ROWS: Final = 64
"""Outputs of a tile: rows of one wgmma, 16 for each of four warps."""
STEPS: Final = (128, 64, 32, 16)
"""Inputs a tile may have, best first: 16 bytes a thread and tile at 64 and 4 bits."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class DenseWeight:
    """A weight as torch multiplies it."""

    weight: Tensor
    """[out, in], in the activations' type."""
    bias: Tensor | None = None
    """[out], in the activations' type."""

    @property
    def outputs(self) -> int:
        """Rows of the weight."""
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        """Columns of the weight."""
        return int(self.weight.shape[1])


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class TiledLinear:
    """A weight at 4 or 8 bits for 16-bit activations of either type; see the module."""

    values: Tensor
    """int32 [tiles, steps, words of a tile]."""
    scales: Tensor
    """int32 [tiles, steps, 32]: pairs of float16."""
    zeros: Tensor | None
    """The same of zero-points, or None when all are 2 ** (bits - 1)."""
    bias: Tensor | None
    """float32 [out]."""
    inputs: int
    outputs: int
    bits: Bits
    step: int

    def __post_init__(self) -> None:
        tiles, steps = self.values.shape[:2]
        words = TILE_ROWS * self.step * self.bits // 32
        if self.values.shape[2] != words or self.step not in STEPS:
            raise ValueError(f"values: {self.values.shape[2]} words a tile, not {words}")
        if tiles * TILE_ROWS < self.outputs or steps * self.step < self.inputs:
            raise ValueError(f"{tiles}x{steps} tiles do not hold {self.outputs}x{self.inputs}")
        for side in (self.scales, self.zeros):
            if side is not None and side.shape != (tiles, steps, TILE_ROWS // 2):
                raise ValueError(f"scales and zeros: {tuple(side.shape)} for {tiles}x{steps} tiles")

    @property
    def tiles(self) -> int:
        """Tiles along the outputs."""
        return int(self.values.shape[0])

    @property
    def steps(self) -> int:
        """Tiles along the inputs."""
        return int(self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weight reads."""
        parts = (self.values, self.scales, self.zeros)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


Single = DenseWeight | TiledLinear | Int8Linear
"""A weight that is one product."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class LowRankWeight:
    """`second(first(x))`; the rank is the width between the two. `first` has no bias."""

    first: Single
    second: Single

    def __post_init__(self) -> None:
        if self.first.outputs != self.second.inputs or self.first.bias is not None:
            raise ValueError("first: must have no bias and give what second takes")

    @property
    def outputs(self) -> int:
        """Rows of the weight that the two stand for."""
        return self.second.outputs

    @property
    def inputs(self) -> int:
        """Columns of the weight that the two stand for."""
        return self.first.inputs


GpuLinear = Single | LowRankWeight
