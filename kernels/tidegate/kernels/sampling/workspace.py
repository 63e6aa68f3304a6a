"""`SamplingWorkspace`: what the sampling kernels hand one another, made once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tidegate.kernels.launch import gpu_of, launch_for

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class SamplingWorkspace:
    """For at most `rows` rows of `vocab` tokens; tiles of `part * parts` tokens."""

    rows: int
    vocab: int
    part: int
    """Tokens that are skipped or measured together."""
    parts: int
    """Of one tile."""
    levels: int
    launches: int
    """Of one search: until an interval of all float32 is one key."""
    saved: Tensor
    part_peaks: Tensor
    tile_peaks: Tensor
    tile_tokens: Tensor
    peaks: Tensor
    partials: Tensor
    states: Tensor
    firsts: Tensor
    cuts: Tensor
    tile_weights: Tensor
    tile_ties: Tensor

    @property
    def tiles(self) -> int:
        """Of one row."""
        return -(-self.vocab // (self.part * self.parts))

    @classmethod
    def allocate(
        cls, *, rows: int, vocab: int, edits: int, device: torch.device | str
    ) -> SamplingWorkspace:
        """Room for `rows` rows of `vocab` tokens with `edits` edits in all."""
        launch = launch_for("sampling", "search", gpu_of(torch.device(device)))
        part, parts, levels = launch["part"], launch["parts"], launch["levels"]
        tiles = -(-vocab // (part * parts))
        launches = math.ceil(32 / math.log2(levels))

        def room(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            rows=rows,
            vocab=vocab,
            part=part,
            parts=parts,
            levels=levels,
            launches=launches,
            saved=room(torch.float32, max(edits, 1)),
            part_peaks=room(torch.float32, rows, tiles * parts),
            tile_peaks=room(torch.float32, rows, tiles),
            tile_tokens=room(torch.int32, rows, tiles),
            peaks=room(torch.float32, rows),
            partials=room(torch.int64, 2, rows, tiles, levels),
            states=room(torch.int64, rows, 2 * launches, 4),
            firsts=room(torch.int64, rows, 2),
            cuts=room(torch.int64, rows, 2),
            tile_weights=room(torch.int64, rows, tiles),
            tile_ties=room(torch.int32, rows, tiles),
        )
