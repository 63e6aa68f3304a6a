"""Starts the kernels of one call of `paged_attention`: their arguments and grids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from tidegate.errors import ConfigError
from tidegate.kernels.attention.decode import combine, decode
from tidegate.kernels.attention.in_order import attend, join
from tidegate.kernels.attention.plan import (
    SEGMENT,
    SHORT,
    DecodePlan,
    OrderedPlan,
    Shape,
    Tile,
    between_floats,
    plan_decode,
    plan_in_order,
    prefill_tile,
)
from tidegate.kernels.attention.prefill import prefill
from tidegate.kernels.launch import Gpu
from tidegate.kernels.paged_kv import KvLayer, StepTensors

Tensor = torch.Tensor

COMBINED_AT_ONCE: Final = 16
"""Segments that `combine` sums in one go: a number of its own, since it orders the sums."""
LOG2_E: Final = math.log2(math.e)
_ANY_NUMBER: Final = 2**31 - 1


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

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What is read, in the order in which every kernel takes it."""
        kv, step = self.kv, self.step
        scales = (kv.key_scales, kv.value_scales)
        return kv.keys, kv.values, *scales, step.starts, step.lengths, step.blocks, self.sinks

    @property
    def strides(self) -> tuple[int, int]:
        """Of q and of the block table."""
        return self.q.stride(0), self.step.blocks.stride(0)

    @property
    def rule(self) -> tuple[int, int | None, float | None, float]:
        """K, the window, and `factors`."""
        return self.shape.kv_heads, self.window, *self.factors

    def constants(self, tile: Tile) -> dict[str, int]:
        """What every kernel is compiled for, with a tile."""
        return {
            "SHARE": self.shape.share,
            "HEAD_SIZE": self.shape.head_size,
            "BLOCK_TOKENS": self.kv.block_tokens,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.keys,
            "BLOCK_H": self.shape.columns,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def launch(call: Call, workspace: Tensor | None) -> None:
    """Attention of all requests, the fastest way."""
    if call.step.most_tokens > SHORT:
        _launch_prefill(call)
    if call.step.most_tokens <= SHORT or call.requests > 1:
        _launch_decode(call, workspace)


def launch_in_order(call: Call, workspace: Tensor | None) -> None:
    """Attention of all requests, each row's sums in an order of its own request alone."""
    most = call.step.most_tokens
    plan = plan_in_order(
        call.shape,
        call.gpu,
        requests=call.requests,
        most_tokens=most,
        most_length=call.step.most_length,
    )
    parts, logs = _between(call, plan.floats, workspace)
    if plan.segments == 1:
        _launch_attend(call, plan, parts, logs, between=(1, _ANY_NUMBER), programs=1)
        return
    if most > SHORT:
        _launch_attend(call, plan, parts, logs, between=(SHORT + 1, _ANY_NUMBER), programs=1)
    if most <= SHORT or call.requests > 1:
        few = (1, plan.most_tokens)
        _launch_attend(call, plan, parts, logs, between=few, programs=plan.segments)
        _launch_join(call, plan, parts, logs)


def _launch_prefill(call: Call) -> None:
    """Requests of more than SHORT new tokens."""
    tile = prefill_tile(call.shape, call.gpu, windowed=call.window is not None)
    prefill[call.shape.kv_heads, _tiles(call, tile)](
        call.q,
        call.out,
        *call.tensors,
        *call.strides,
        call.requests,
        *call.rule,
        SHORT=SHORT,
        **call.constants(tile),
    )


def _tiles(call: Call, tile: Tile) -> int:
    """As many as all requests have at most, see `find_request`."""
    return int(call.q.shape[0]) // (tile.rows // call.shape.share) + call.requests


def _launch_decode(call: Call, workspace: Tensor | None) -> None:
    """Requests of at most SHORT new tokens."""
    plan = plan_decode(
        call.shape,
        call.gpu,
        requests=call.requests,
        most_tokens=call.step.most_tokens,
        most_length=call.step.most_length,
    )
    floats = between_floats(call.shape, plan, call.requests)
    parts, logs = _between(call, floats, workspace) if floats else (None, None)
    decode[call.requests * plan.tiles, call.shape.kv_heads, plan.segments](
        call.q,
        call.out,
        parts,
        logs,
        *call.tensors,
        *call.strides,
        *call.rule,
        plan.tiles,
        plan.most_tokens,
        SHORT=SHORT,
        **call.constants(plan.tile),
    )
    if parts is not None:
        _launch_combine(call, plan, parts, logs)


def _between(call: Call, floats: int, workspace: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the segments write and the joining reads, cut from the workspace."""
    if workspace is None:
        workspace = torch.empty(floats, dtype=torch.float32, device=call.q.device)
    if workspace.numel() < floats:
        raise ConfigError("workspace", workspace.numel(), f"at least {floats} float32 values")
    parts = floats // (call.shape.head_size + 1) * call.shape.head_size
    return workspace[:parts], workspace[parts:floats]


def _launch_combine(call: Call, plan: DecodePlan, parts: Tensor, logs: Tensor | None) -> None:
    combine[call.requests * plan.most_tokens, call.shape.heads](
        *_to_join(call, plan, parts, logs),
        SHORT=SHORT,
        BLOCK_S=COMBINED_AT_ONCE,
        **_joining(call, plan.tile, plan.tile_tokens),
    )


def _launch_attend(
    call: Call,
    plan: OrderedPlan,
    parts: Tensor,
    logs: Tensor,
    *,
    between: tuple[int, int],
    programs: int,
) -> None:
    """The requests whose number of new tokens lies `between`, both ends among it."""
    attend[call.shape.kv_heads, _tiles(call, plan.tile), programs](
        call.q,
        call.out,
        parts,
        logs,
        *call.tensors,
        *call.strides,
        call.requests,
        *call.rule,
        *between,
        SEGMENT=SEGMENT,
        **call.constants(plan.tile),
    )


def _launch_join(call: Call, plan: OrderedPlan, parts: Tensor, logs: Tensor) -> None:
    join[call.requests * plan.most_tokens, call.shape.heads](
        *_to_join(call, plan, parts, logs),
        SEGMENT=SEGMENT,
        **_joining(call, plan.tile, plan.tile.rows // call.shape.share),
    )


def _to_join(
    call: Call, plan: DecodePlan | OrderedPlan, parts: Tensor, logs: Tensor | None
) -> tuple[object, ...]:
    """What joining segments takes, whatever the order of its sums."""
    step, rule = call.step, (call.shape.heads, call.window)
    between = (parts, logs, step.starts, step.lengths, call.sinks)
    return call.out, *between, *rule, plan.most_tokens, plan.segments


def _joining(call: Call, tile: Tile, tile_tokens: int) -> dict[str, int]:
    """What joining is compiled for: the tiles that its segments are of."""
    return {
        "TILE_TOKENS": tile_tokens,
        "HEAD_SIZE": call.shape.head_size,
        "BLOCK_N": tile.keys,
        "BLOCK_H": call.shape.columns,
        "num_warps": 4,
    }
