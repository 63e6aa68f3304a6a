"""`route` and `moe`: the wrappers of the experts' kernels; `reference` defines both.

Few pairs have kernels of their own, and blocks are larger where there are many; when
`deterministic`, blocks are of one size whatever the step, and a row depends on its token alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from tidegate.kernels.launch import gpu_of, launch_for
from tidegate.kernels.linear.plan import DENSE_STEP
from tidegate.kernels.linear.weights import TILE_ROWS, DenseWeight
from tidegate.kernels.moe.few import few_down_kernel, few_gate_up_kernel
from tidegate.kernels.moe.plan import ExpertsPlan, plan_experts
from tidegate.kernels.moe.products import combine_kernel, down_kernel, gate_up_kernel
from tidegate.kernels.moe.routing import group_kernel, route_kernel
from tidegate.kernels.moe.weights import ExpertWeights, Stacked
from tidegate.model.architecture import Activation

Tensor = torch.Tensor

_SORTED_AT_ONCE = 1024
"""Pairs that a program of the sorting reads at a time: a number of its own, so that steps of other
sizes ask for no other compilation."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class MoeWorkspace:
    """Memory beside the output, for any number of tokens up to the most; see `of`."""

    order: Tensor
    """int32 [pairs]."""
    counts: Tensor
    """int32 [E]."""
    inner: Tensor
    """[pairs * inner], in the activations' type."""
    answers: Tensor
    """[pairs * width]."""

    @classmethod
    def of(
        cls,
        weights: ExpertWeights,
        *,
        most_tokens: int,
        chosen: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> MoeWorkspace:
        """For one layer, and all that are like it."""
        pairs = most_tokens * chosen
        return cls(
            order=torch.empty(pairs, dtype=torch.int32, device=device),
            counts=torch.empty(weights.count, dtype=torch.int32, device=device),
            inner=torch.empty(pairs * weights.inner, dtype=dtype, device=device),
            answers=torch.empty(pairs * weights.width, dtype=dtype, device=device),
        )


def route(
    logits: Tensor,
    *,
    chosen: int,
    normalised: bool,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose experts, each token for itself.

    Args:
        logits: [T, E].
        chosen: experts of a token.
        normalised: whether a token's shares are scaled to sum to 1.
        out: where both results go.

    Returns:
        Experts, int32 [T, chosen], best first, and their shares, float32 [T, chosen].
    """
    tokens, count = logits.shape
    if not 1 <= chosen <= count or logits.stride(1) != 1:
        raise ValueError(f"chosen = {chosen}: must be 1 to {count}, the experts of `logits`")
    if out is None:
        shape, device = (tokens, chosen), logits.device
        out = (
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
        )
    experts, shares = out
    if tokens:
        route_kernel[(tokens,)](
            logits,
            experts,
            shares,
            logits.stride(0),
            COUNT=count,
            CHOSEN=chosen,
            NORMALISED=normalised,
            BLOCK=triton.next_power_of_2(count),
            CHOSEN_BLOCK=triton.next_power_of_2(chosen),
            num_warps=1,
        )
    return experts, shares


def moe(
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
    """The sum of the chosen experts' gated MLPs, weighted by `shares`; see `reference.moe`.

    Args:
        x: [T, width]; rows may have gaps, columns may not.
        experts: int32 [T, chosen], without gaps.
        shares: float32 [T, chosen], without gaps.
        weights: the layer's experts.
        act: between gate and product.
        out: [T, width], to write into.
        workspace: for at least T tokens; made anew when there is none.
        deterministic: whether sums are in one order, whatever else is in the step.

    Returns:
        [T, width] in the type of `x`.
    """
    tokens, chosen = experts.shape
    if x.shape != (tokens, weights.width) or (tokens and x.stride(1) != 1):
        raise ValueError(f"x: {tuple(x.shape)}: must be [{tokens}, {weights.width}]")
    out = torch.empty_like(x) if out is None else out
    if tokens == 0:
        return out
    workspace = workspace or MoeWorkspace.of(
        weights, most_tokens=tokens, chosen=chosen, dtype=x.dtype, device=x.device
    )
    if workspace.order.numel() < tokens * chosen:
        raise ValueError(f"workspace: {workspace.order.numel()} pairs, not {tokens * chosen}")
    plan = plan_experts(
        pairs=tokens * chosen,
        experts=weights.count,
        gpu=gpu_of(x.device),
        deterministic=deterministic,
    )
    if plan.direct and _kind(weights) != "dense":
        _few_products(x, experts, weights, act, workspace)
    else:
        _products(x, experts, weights, act, plan, workspace)
    block = min(1024, triton.next_power_of_2(weights.width))
    combine_kernel[(tokens, triton.cdiv(weights.width, block))](
        workspace.answers,
        shares,
        out,
        weights.width,
        out.stride(0),
        CHOSEN=chosen,
        BLOCK=block,
        num_warps=4,
    )
    return out


def _products(
    x: Tensor,
    experts: Tensor,
    weights: ExpertWeights,
    act: Activation,
    plan: ExpertsPlan,
    workspace: MoeWorkspace,
) -> None:
    """Sort the pairs, then gate and up, then down, into the workspace."""
    if not plan.direct:
        pairs = experts.numel()
        group_kernel[(weights.count,)](
            experts, workspace.order, workspace.counts, pairs, BLOCK=_SORTED_AT_ONCE, num_warps=4
        )
    found = (experts, workspace.counts, workspace.order)
    shared = {
        "COUNT": weights.count,
        "COUNT_BLOCK": triton.next_power_of_2(weights.count),
        "DIRECT": plan.direct,
        "TILES": plan.tiles,
        "TOKENS": plan.tokens,
        "STAGES": plan.num_stages,
        "num_warps": plan.num_warps,
    }
    gate_up_kernel[(_blocks(weights.inner, plan), plan.blocks)](
        x,
        *found,
        *_tensors(weights.gate),
        *_tensors(weights.up),
        workspace.inner,
        x.stride(0),
        weights.width,
        weights.inner,
        CHOSEN=experts.shape[1],
        ACT=act,
        **_packing(weights.gate),
        **shared,
    )
    down_kernel[(_blocks(weights.width, plan), plan.blocks)](
        workspace.inner,
        *found,
        *_tensors(weights.down),
        workspace.answers,
        weights.inner,
        weights.width,
        **_packing(weights.down),
        **shared,
    )


def _few_products(
    x: Tensor, experts: Tensor, weights: ExpertWeights, act: Activation, workspace: MoeWorkspace
) -> None:
    """Gate and up, then down, a program for 16 outputs of each pair."""
    launch = launch_for("moe", "few", gpu_of(x.device))
    pairs, abreast = experts.numel(), launch["num_warps"]
    shared = {"ABREAST": abreast, "STAGES": launch["num_stages"], "num_warps": abreast}
    few_gate_up_kernel[(triton.cdiv(weights.inner, 16), pairs)](
        x,
        experts,
        *_tensors(weights.gate),
        *_tensors(weights.up),
        workspace.inner,
        x.stride(0),
        weights.width,
        weights.inner,
        CHOSEN=experts.shape[1],
        ACT=act,
        **_packing(weights.gate, abreast),
        **shared,
    )
    few_down_kernel[(triton.cdiv(weights.width, 16), pairs)](
        workspace.inner,
        experts,
        *_tensors(weights.down),
        workspace.answers,
        weights.inner,
        weights.width,
        **_packing(weights.down, abreast),
        **shared,
    )


def _kind(weights: ExpertWeights) -> str:
    dense = isinstance(weights.gate, DenseWeight) or isinstance(weights.down, DenseWeight)
    return "dense" if dense else "tiled"


def _blocks(rows: int, plan: ExpertsPlan) -> int:
    return triton.cdiv(rows, TILE_ROWS * plan.tiles)  # type: ignore[no-any-return]


def _tensors(weight: Stacked) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Values, scales and zero-points, as the kernels take them."""
    if isinstance(weight, DenseWeight):
        return weight.weight, None, None
    return weight.values, weight.scales, weight.zeros


def _packing(weight: Stacked, abreast: int = 1) -> dict[str, int | bool]:
    """How the kernels are to read `weight`, `abreast` steps at a time."""
    if isinstance(weight, DenseWeight):
        return {"STEP": DENSE_STEP, "BITS": 16, "SYMMETRIC": True, "EVEN": False}
    return {
        "STEP": weight.step,
        "BITS": weight.bits,
        "SYMMETRIC": weight.zeros is None,
        "EVEN": weight.steps * weight.step == weight.inputs and weight.steps % abreast == 0,
    }
