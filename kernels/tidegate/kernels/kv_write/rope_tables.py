"""`RopeTables`: cosines and sines of every position that can be served, on the device.

A table and not angles computed in the kernel: float32 cannot hold `position * frequency` at the
positions that long contexts reach, so they are computed once in float64 and rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tidegate.model.rope import Rope


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class RopeTables:
    """Rotation of value `i` of a head with value `i + size / 2`, for all positions."""

    cos: torch.Tensor
    """float32 [context, size / 2], contiguous, the rotation's magnitude included."""
    sin: torch.Tensor

    @property
    def size(self) -> int:
        """How many values of a head are rotated; the others pass through."""
        return 2 * int(self.cos.shape[1])

    @property
    def context(self) -> int:
        """Positions that the tables hold."""
        return int(self.cos.shape[0])

    @classmethod
    def from_rope(cls, rope: Rope, context: int, device: torch.device | str = "cpu") -> RopeTables:
        """Tables of the positions 0 to `context - 1`: `8 * context * size / 2` bytes."""
        cos, sin = rope.tables(np.arange(context))
        return cls(
            cos=torch.from_numpy(cos.astype(np.float32)).to(device),
            sin=torch.from_numpy(sin.astype(np.float32)).to(device),
        )
