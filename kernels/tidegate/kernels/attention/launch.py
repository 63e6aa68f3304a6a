"""Starts the kernels of one call of `paged_attention`: their arguments and grids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from tidegate.errors import ConfigError
from tidegate.kernels.attention.decode import combine, decode
from tidegate.kernels.attention.plan import (
    SHORT,
    DecodePlan,
    Shape,
    between_floats,
    plan_decode,
    prefill_tile,
)
from tidegate.kernels.attention.prefill import prefill
from tidegate.kernels.launch import Gpu
from tidegate.kernels.paged_kv import KvLayer, StepTensors

Tensor = torch.Tensor

COMBINED_AT_ONCE: Final = 16
"""Segments that `combine` sums in one go: a number of its own, since it orders the sums."""
LOG2_E: Final = math.log2(math.e)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Call:
    """What one call of `paged_attention` is about."""

    q: Tensor
    out: Tensor
    kv: KvLayer
    step: StepTensors
    shape: Shape
    gpu: Gpu
    sinks: Tensor | None
    window: int | None
    scale: float
    softcap: float | None

    @property
    def requests(self) -> int:
        """B, padding included."""
        return int(self.step.lengths.shape[0])

    @property
    def factors(self) -> tuple[float | None, float]:
        """`cap` and `factor` of `tile.py`'s rule: exp2 of what they make is the exponential."""
        if self.softcap is None:
            return None, self.scale * LOG2_E
        return self.scale / self.softcap, self.softcap * LOG2_E


def launch_prefill(call: Call) -> None:
    """Attention of the requests of more than SHORT new tokens."""
    kv, step, shape = call.kv, call.step, call.shape
    tile = prefill_tile(shape, call.gpu, windowed=call.window is not None)
    tiles = call.q.shape[0] // (tile.rows // shape.share) + call.requests
    cap, factor = call.factors
    prefill[shape.kv_heads, tiles](
        call.q,
        call.out,
        kv.keys,
        kv.values,
        kv.key_scales,
        kv.value_scales,
        step.starts,
        step.lengths,
        step.blocks,
        call.sinks,
        call.q.stride(0),
        step.blocks.stride(0),
        call.requests,
        shape.kv_heads,
        call.window,
        cap,
        factor,
        SHORT=SHORT,
        SHARE=shape.share,
        HEAD_SIZE=shape.head_size,
        BLOCK_TOKENS=kv.block_tokens,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        BLOCK_H=shape.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def launch_decode(call: Call, workspace: Tensor | None, *, deterministic: bool) -> None:
    """Attention of the requests of at most SHORT new tokens."""
    plan = plan_decode(
        call.shape,
        call.gpu,
        requests=call.requests,
        most_tokens=call.step.most_tokens,
        most_length=call.step.most_length,
        deterministic=deterministic,
    )
    parts, logs = _between(call, plan, workspace)
    _launch_segments(call, plan, parts, logs)
    if parts is not None:
        _launch_combine(call, plan, parts, logs)


def _between(
    call: Call, plan: DecodePlan, workspace: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What the segments write and `combine` reads, cut from the workspace; None for one segment."""
    floats = between_floats(call.shape, plan, call.requests)
    if floats == 0:
        return None, None
    if workspace is None:
        workspace = torch.empty(floats, dtype=torch.float32, device=call.q.device)
    if workspace.numel() < floats:
        raise ConfigError("workspace", workspace.numel(), f"at least {floats} float32 values")
    parts = floats // (call.shape.head_size + 1) * call.shape.head_size
    return workspace[:parts], workspace[parts:floats]


def _launch_segments(
    call: Call, plan: DecodePlan, parts: Tensor | None, logs: Tensor | None
) -> None:
    kv, step, shape, tile = call.kv, call.step, call.shape, plan.tile
    cap, factor = call.factors
    decode[call.requests * plan.tiles, shape.kv_heads, plan.segments](
        call.q,
        call.out,
        parts,
        logs,
        kv.keys,
        kv.values,
        kv.key_scales,
        kv.value_scales,
        step.starts,
        step.lengths,
        step.blocks,
        call.sinks,
        call.q.stride(0),
        step.blocks.stride(0),
        shape.kv_heads,
        call.window,
        cap,
        factor,
        plan.tiles,
        plan.most_tokens,
        SHORT=SHORT,
        FIXED=plan.fixed,
        SHARE=shape.share,
        HEAD_SIZE=shape.head_size,
        BLOCK_TOKENS=kv.block_tokens,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        BLOCK_H=shape.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _launch_combine(call: Call, plan: DecodePlan, parts: Tensor, logs: Tensor | None) -> None:
    step, shape = call.step, call.shape
    combine[call.requests * plan.most_tokens, shape.heads](
        call.out,
        parts,
        logs,
        step.starts,
        step.lengths,
        call.sinks,
        shape.heads,
        call.window,
        plan.most_tokens,
        plan.segments,
        SHORT=SHORT,
        FIXED=plan.fixed,
        TILE_TOKENS=plan.tile_tokens,
        HEAD_SIZE=shape.head_size,
        BLOCK_N=plan.tile.keys,
        BLOCK_H=shape.columns,
        BLOCK_S=COMBINED_AT_ONCE,
        num_warps=4,
    )
