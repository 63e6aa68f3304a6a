"""`Kernels`: the functions that `PagedOps` calls, as one set or the other.

`torch_kernels()` are the references that define each of them; `triton_kernels()` the wrappers of
the kernels. Both take the same arguments, so control flow that is tested with one holds for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from tidegate.kernels.attention.reference import paged_attention
from tidegate.kernels.kv_write.reference import write_kv
from tidegate.kernels.kv_write.rope_tables import RopeTables
from tidegate.kernels.linear.reference import linear
from tidegate.kernels.linear.weights import GpuLinear
from tidegate.kernels.moe.reference import moe, route
from tidegate.kernels.moe.weights import ExpertWeights
from tidegate.kernels.paged_kv import KvLayer, StepTensors
from tidegate.kernels.torch_ops import activate
from tidegate.model.architecture import Activation

Tensor = torch.Tensor


class PagedAttention(Protocol):
    """See `tidegate.kernels.attention`."""

    def __call__(
        self,
        q: Tensor,
        kv: KvLayer,
        step: StepTensors,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
        workspace: Tensor | None = None,
        deterministic: bool = False,
    ) -> Tensor: ...


class WriteKv(Protocol):
    """See `tidegate.kernels.kv_write`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: KvLayer,
        step: StepTensors,
        *,
        rope: RopeTables | None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
        clip: float | None = None,
        out: Tensor | None = None,
    ) -> Tensor: ...


class RmsNorm(Protocol):
    """See `tidegate.kernels.pointwise`."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        *,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class GatedActivation(Protocol):
    """See `tidegate.kernels.pointwise`."""

    def __call__(
        self, gate_up: Tensor, act: Activation, *, out: Tensor | None = None
    ) -> Tensor: ...


class EmbedRows(Protocol):
    """See `tidegate.kernels.pointwise`."""

    def __call__(self, table: Tensor, tokens: Tensor, *, out: Tensor | None = None) -> Tensor: ...


class LinearProduct(Protocol):
    """See `tidegate.kernels.linear`."""

    def __call__(self, x: Tensor, weight: GpuLinear, *, out: Tensor | None = None) -> Tensor: ...


class Route(Protocol):
    """See `tidegate.kernels.moe`."""

    def __call__(
        self, logits: Tensor, *, chosen: int, normalised: bool
    ) -> tuple[Tensor, Tensor]: ...


class Moe(Protocol):
    """See `tidegate.kernels.moe`."""

    def __call__(
        self,
        x: Tensor,
        experts: Tensor,
        shares: Tensor,
        weights: ExpertWeights,
        act: Activation,
        *,
        out: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Kernels:
    """One set."""

    name: str
    paged_attention: PagedAttention
    write_kv: WriteKv
    rms_norm: RmsNorm
    gated_activation: GatedActivation
    embed_rows: EmbedRows
    linear: LinearProduct
    route: Route
    moe: Moe


def _rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else residual + x
    wide = total.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight
    return (normal.to(x.dtype) if out is None else out.copy_(normal)), total


def _gated(gate_up: Tensor, act: Activation, *, out: Tensor | None = None) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    result = activate(gate, act) * up
    return result.to(gate_up.dtype) if out is None else out.copy_(result)


def _embed(table: Tensor, tokens: Tensor, *, out: Tensor | None = None) -> Tensor:
    rows = table[tokens.long()]
    return rows if out is None else out.copy_(rows)


def torch_kernels() -> Kernels:
    """The references, for a machine without a GPU and for tests."""
    return Kernels(
        name="torch references",
        paged_attention=paged_attention,
        write_kv=write_kv,
        rms_norm=_rms_norm,
        gated_activation=_gated,
        embed_rows=_embed,
        linear=linear,
        route=route,
        moe=moe,
    )


def triton_kernels() -> Kernels:
    """The kernels."""
    return torch_kernels()
