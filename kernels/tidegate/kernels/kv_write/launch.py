"""Starts the kernel of one call of `write_kv`: its arguments and grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from tidegate.kernels.kv_write.rope_tables import RopeTables
from tidegate.kernels.kv_write.write import write
from tidegate.kernels.paged_kv import KvLayer, StepTensors

Tensor = torch.Tensor

TILE_VALUES: Final = 1024
"""Values of a program: 8 a thread of four warps, one 16-byte load. By rule, not measured."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Norms:
    """The RMS norms of query and key."""

    q: Tensor | None
    k: Tensor | None
    q_over_row: bool
    k_over_row: bool
    eps: float


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kv: KvLayer,
    step: StepTensors,
    rope: RopeTables | None,
    norms: Norms,
    clip: float | None,
) -> None:
    """One program per token and tile of heads."""
    tokens, heads, head_size = q.shape
    columns, tile_heads, warps = tile_of(
        heads, kv.kv_heads, head_size, whole_row=norms.q_over_row or norms.k_over_row
    )
    tiles = -(-heads // tile_heads) + 2 * -(-kv.kv_heads // tile_heads)
    write[tokens, tiles](
        q,
        k,
        v,
        out,
        kv.keys,
        kv.values,
        kv.key_scales,
        kv.value_scales,
        norms.q,
        norms.k,
        None if rope is None else rope.cos,
        None if rope is None else rope.sin,
        step.positions,
        step.places,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        out.stride(0),
        heads,
        kv.kv_heads,
        norms.eps,
        clip,
        HEAD_SIZE=head_size,
        HALF=0 if rope is None else rope.size // 2,
        BLOCK_TOKENS=kv.block_tokens,
        TILE_HEADS=tile_heads,
        BLOCK_H=columns,
        Q_ROW=norms.q_over_row,
        K_ROW=norms.k_over_row,
        num_warps=warps,
    )


def tile_of(heads: int, kv_heads: int, head_size: int, *, whole_row: bool) -> tuple[int, int, int]:
    """Columns and heads of a program's tile, and its warps."""
    columns = _power_of_two(head_size)
    if whole_row:
        tile_heads = _power_of_two(max(heads, kv_heads))
    else:
        tile_heads = max(1, min(_power_of_two(heads), TILE_VALUES // columns))
    warps = max(1, min(8, tile_heads * columns // 256))
    return columns, tile_heads, warps


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
