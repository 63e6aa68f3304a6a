"""The experts of one layer on a GPU: the same weight of all of them one behind the other.

Rows are stacked, expert after expert; tiled weights are padded to whole tiles per expert, so
expert e's tiles begin at `e * tiles / count`. All experts of a layer have one shape and one way of
packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tidegate.errors import ConversionError
from tidegate.kernels.linear.retile import retile
from tidegate.kernels.linear.weights import DenseWeight, TiledLinear
from tidegate.model.ops import GatedMlp
from tidegate.model.packed import DenseLinear, Linear, PackedLinear

Tensor = torch.Tensor
Stacked = DenseWeight | TiledLinear


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ExpertWeights:
    """`down(act(gate(x)) * up(x))` of `count` experts; see the module."""

    gate: Stacked
    up: Stacked
    down: Stacked
    count: int
    width: int
    """Of a token."""
    inner: int
    """Of the space between the products."""

    def __post_init__(self) -> None:
        if _kind(self.gate) != _kind(self.up):
            raise ValueError("gate and up: must both be dense, or tiled in the same way")


def stack_experts(
    experts: Sequence[GatedMlp], *, device: torch.device | str, dtype: torch.dtype
) -> ExpertWeights:
    """Bring a layer's experts to `device`; packed ones stay packed, dense ones become `dtype`.

    Raises:
        ConversionError: experts with a bias, or that differ in shape or in how they are packed.
    """
    first = experts[0]
    # Stacked as one, so that both have zero-points if either has some.
    both = [expert.gate for expert in experts] + [expert.up for expert in experts]
    gate, up = _halves(_stack(both, device, dtype))
    return ExpertWeights(
        gate=gate,
        up=up,
        down=_stack([expert.down for expert in experts], device, dtype),
        count=len(experts),
        width=first.gate.inputs,
        inner=first.gate.outputs,
    )


def _kind(weight: Stacked) -> tuple[int, int, bool] | None:
    """What two weights must share to be read by one kernel; None for dense ones."""
    if isinstance(weight, DenseWeight):
        return None
    return weight.bits, weight.step, weight.zeros is None


def _halves(both: Stacked) -> tuple[Stacked, Stacked]:
    """Views of the first and the second half of a stack."""
    if isinstance(both, DenseWeight):
        gate, up = both.weight.chunk(2)
        return DenseWeight(weight=gate), DenseWeight(weight=up)
    half, outputs = both.tiles // 2, both.outputs // 2
    parts = (slice(None, half), slice(half, None))
    gate_tiles, up_tiles = (
        replace(
            both,
            values=both.values[part],
            scales=both.scales[part],
            zeros=None if both.zeros is None else both.zeros[part],
            outputs=outputs,
        )
        for part in parts
    )
    return gate_tiles, up_tiles


def _stack(linears: Sequence[Linear], device: torch.device | str, dtype: torch.dtype) -> Stacked:
    if any(linear.bias is not None for linear in linears):
        raise ConversionError("experts: a bias in an expert is not supported")
    if len({(linear.outputs, linear.inputs) for linear in linears}) != 1:
        raise ConversionError("experts: all of a layer must have one shape")
    dense = [linear for linear in linears if isinstance(linear, DenseLinear)]
    if len(dense) == len(linears):
        parts = [torch.from_numpy(linear.weight).to(device, dtype) for linear in dense]
        return DenseWeight(weight=torch.cat(parts))
    packed = [linear for linear in linears if isinstance(linear, PackedLinear)]
    if len(packed) != len(linears) or len({(p.bits, p.group_size) for p in packed}) != 1:
        raise ConversionError("experts: all of a layer must be packed in the same way")
    return _concatenate([retile([linear], device=device) for linear in packed])


def _concatenate(tiled: Sequence[TiledLinear]) -> TiledLinear:
    """Experts' tiles one behind the other; zero-points spelled out once one expert has some."""
    first = tiled[0]
    zeros = None
    if any(part.zeros is not None for part in tiled):
        zeros = torch.cat([_spelled_zeros(part) for part in tiled])
    return TiledLinear(
        values=torch.cat([part.values for part in tiled]),
        scales=torch.cat([part.scales for part in tiled]),
        zeros=zeros,
        bias=None,
        inputs=first.inputs,
        outputs=sum(part.tiles for part in tiled) * 64,
        bits=first.bits,
        step=first.step,
    )


def _spelled_zeros(part: TiledLinear) -> Tensor:
    if part.zeros is not None:
        return part.zeros
    pairs = torch.full((*part.scales.shape, 2), 1 << (part.bits - 1), dtype=torch.float16)
    return pairs.view(torch.int32)[..., 0].to(part.scales.device)
