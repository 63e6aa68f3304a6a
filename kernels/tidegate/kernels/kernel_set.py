"""`Kernels`: the functions that `PagedOps` calls, as one set or the other.

`torch_kernels()` are the references that define each of them; `triton_kernels()` the wrappers of
the kernels. Both take the same arguments, so control flow that is tested with one holds for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from tidegate.kernels.kv_write.rope_tables import RopeTables
    from tidegate.kernels.linear.weights import GpuLinear
    from tidegate.kernels.linear.workspace import LinearWorkspace
    from tidegate.kernels.moe import MoeWorkspace
    from tidegate.kernels.moe.weights import ExpertWeights
    from tidegate.kernels.paged_kv import KvLayer, StepTensors
    from tidegate.kernels.pointwise.table import Table
    from tidegate.kernels.sampling.asks import SamplingAsks
    from tidegate.kernels.sampling.workspace import SamplingWorkspace
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


class Adjust(Protocol):
    """See `tidegate.kernels.pointwise`."""

    def __call__(
        self,
        x: Tensor,
        *,
        factor: float = 1.0,
        limit: float | None = None,
        cap: float | None = None,
        out: Tensor | None = None,
    ) -> Tensor: ...


class EmbedRows(Protocol):
    """See `tidegate.kernels.pointwise`."""

    def __call__(
        self,
        table: Table,
        tokens: Tensor,
        *,
        factor: float = 1.0,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor: ...


class GatherRows(Protocol):
    """See `tidegate.kernels.pointwise`."""

    def __call__(self, x: Tensor, rows: Tensor, *, out: Tensor | None = None) -> Tensor: ...


class LinearProduct(Protocol):
    """See `tidegate.kernels.linear`."""

    def __call__(
        self,
        x: Tensor,
        weight: GpuLinear,
        *,
        out: Tensor | None = None,
        deterministic: bool = False,
        workspace: LinearWorkspace | None = None,
    ) -> Tensor: ...


class Route(Protocol):
    """See `tidegate.kernels.moe`."""

    def __call__(
        self,
        logits: Tensor,
        *,
        chosen: int,
        normalised: bool,
        out: tuple[Tensor, Tensor] | None = None,
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
        workspace: MoeWorkspace | None = None,
        deterministic: bool = False,
    ) -> Tensor: ...


class Sample(Protocol):
    """See `tidegate.kernels.sampling`."""

    def __call__(
        self,
        logits: Tensor,
        asks: SamplingAsks,
        *,
        out: Tensor | None = None,
        workspace: SamplingWorkspace | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Kernels:
    """One set."""

    name: str
    paged_attention: PagedAttention
    write_kv: WriteKv
    rms_norm: RmsNorm
    gated_activation: GatedActivation
    adjust: Adjust
    embed_rows: EmbedRows
    gather_rows: GatherRows
    linear: LinearProduct
    route: Route
    moe: Moe
    sample: Sample


def torch_kernels() -> Kernels:
    """The references, for a machine without a GPU and for tests."""
    # Imported here: the folders' own modules need Triton, which a cloud on torch goes without.
    from tidegate.kernels.attention import reference as attention
    from tidegate.kernels.kv_write import reference as kv_write
    from tidegate.kernels.linear import reference as linear
    from tidegate.kernels.moe import reference as moe
    from tidegate.kernels.pointwise import reference as pointwise
    from tidegate.kernels.sampling import reference as sampling

    def product(
        x: Tensor,
        weight: GpuLinear,
        *,
        out: Tensor | None = None,
        deterministic: bool = False,
        workspace: LinearWorkspace | None = None,
    ) -> Tensor:
        return linear.linear(x, weight, out=out)

    def mixture(
        x: Tensor,
        experts: Tensor,
        shares: Tensor,
        weights: ExpertWeights,
        act: Activation,
        *,
        out: Tensor | None = None,
        workspace: MoeWorkspace | None = None,
        deterministic: bool = False,
    ) -> Tensor:
        return moe.moe(x, experts, shares, weights, act, out=out)

    def choose(
        logits: Tensor,
        asks: SamplingAsks,
        *,
        out: Tensor | None = None,
        workspace: SamplingWorkspace | None = None,
    ) -> Tensor:
        return sampling.sample(logits, asks, out=out)

    return Kernels(
        name="torch references",
        paged_attention=attention.paged_attention,
        write_kv=kv_write.write_kv,
        rms_norm=pointwise.rms_norm,
        gated_activation=pointwise.gated_activation,
        adjust=pointwise.adjust,
        embed_rows=pointwise.embed_rows,
        gather_rows=pointwise.gather_rows,
        linear=product,
        route=moe.route,
        moe=mixture,
        sample=choose,
    )


def triton_kernels() -> Kernels:
    """The kernels; on a CPU they are interpreted, where `TRITON_INTERPRET` says so."""
    from tidegate.kernels import attention, kv_write, linear, moe, pointwise, sampling

    return Kernels(
        name="Triton kernels",
        paged_attention=attention.paged_attention,
        write_kv=kv_write.write_kv,
        rms_norm=pointwise.rms_norm,
        gated_activation=pointwise.gated_activation,
        adjust=pointwise.adjust,
        embed_rows=pointwise.embed_rows,
        gather_rows=pointwise.gather_rows,
        linear=linear.apply_linear,
        route=moe.route,
        moe=moe.moe,
        sample=sampling.sample,
    )
