"""`PackedTable`: an embedding table of 4 or 8 bits on the device, in `PackedLinear`'s own layout.

A row of the table is a row of the packed weight, so a token reads `width * bits / 8` bytes in one
run. A table that is the head's weight too is read from the head's tiles and kept once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tidegate.kernels.linear.weights import TiledLinear
from tidegate.model.packed import Bits, PackedLinear

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class PackedTable:
    """[V, width] at 4 or 8 bits; `w[v, i] = (value - zero) * scale` of the group of `i`."""

    values: Tensor
    """uint8 [V, groups * group_size * bits / 8], low nibble first."""
    scales: Tensor
    """float16 [V, groups]."""
    zeros: Tensor | None
    """uint8 [V, groups]; None for 2 ** (bits - 1) everywhere."""
    width: int
    bits: Bits
    group_size: int

    @classmethod
    def of(cls, linear: PackedLinear, device: torch.device | str = "cpu") -> PackedTable:
        """The table that a packed weight is; it must have no bias."""
        assert linear.bias is None, "embeddings have no bias"
        values = torch.from_numpy(linear.values).flatten(1)
        zeros = None if linear.zeros is None else torch.from_numpy(linear.zeros).to(device)
        return cls(
            values=values.contiguous().to(device),
            scales=torch.from_numpy(linear.scales).half().to(device),
            zeros=zeros,
            width=linear.inputs,
            bits=linear.bits,
            group_size=linear.group_size,
        )

    def rows(self, tokens: Tensor) -> Tensor:
        """The rows that the integers stand for, float32 [T, width]."""
        packed = self.values[tokens.long()].int()
        if self.bits == 4:
            packed = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
        scales = self.scales[tokens.long()].float()
        middle = torch.full_like(scales, 1 << (self.bits - 1))
        zeros = middle if self.zeros is None else self.zeros[tokens.long()].float()
        grouped = packed.float().view(len(packed), -1, self.group_size)
        return ((grouped - zeros[..., None]) * scales[..., None]).flatten(1)[:, : self.width]

    @property
    def nbytes(self) -> int:
        """Of the whole table."""
        parts = (self.values, self.scales, self.zeros)
        return sum(part.nbytes for part in parts if part is not None)


Table = Tensor | PackedTable | TiledLinear
"""An embedding table: rows in the activations' type, or integers."""


def table_width(table: Table) -> int:
    """Values of a row."""
    match table:
        case PackedTable():
            return table.width
        case TiledLinear():
            return table.inputs
        case _:
            return int(table.shape[1])
