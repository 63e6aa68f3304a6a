"""Memory that products need beside their output, taken once for all layers of a model.

Layers run one behind the other on one stream, so one workspace serves all of them, and graphs that
were captured with it may be replayed. Counters are 0 between launches: whoever counts to the end
sets them back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from tidegate.kernels.launch import Gpu, gpu_of, launch_for
from tidegate.kernels.linear.few import suits_few
from tidegate.kernels.linear.int8 import Int8Linear
from tidegate.kernels.linear.plan import ProductPlan, plan_product
from tidegate.kernels.linear.weights import (
    DenseWeight,
    GpuLinear,
    LowRankWeight,
    Single,
    TiledLinear,
)

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class LinearWorkspace:
    """See `LinearWorkspace.of`."""

    partial: Tensor
    """float32, the sums of splits."""
    arrived: Tensor
    """int32, programs that have left theirs; all 0 between launches."""
    wide: Tensor
    """A whole weight in the activations' type, when that is how many tokens are multiplied."""
    rows: Tensor
    """int8, activations that were rounded for 8-bit products."""
    row_scales: Tensor
    """float32 [T], of `rows`."""

    @classmethod
    def of(
        cls,
        weights: Iterable[GpuLinear],
        *,
        most_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        deterministic: bool = False,
    ) -> LinearWorkspace:
        """Enough for the product of each of `weights` with any number of tokens up to the most."""
        gpu = gpu_of(torch.device(device))
        partial = arrived = wide = rounded = 0
        for weight in single_weights(weights):
            if isinstance(weight, DenseWeight) and not deterministic:
                continue
            for tokens in _sizes(most_tokens):
                plan = plan_product(weight, tokens, gpu, deterministic=deterministic)
                partial = max(partial, plan.partial_sums)
                arrived = max(arrived, plan.blocks if plan.partial_sums else 0)
            if isinstance(weight, TiledLinear):
                wide = max(wide, weight.outputs * weight.inputs)
            if isinstance(weight, Int8Linear):
                rounded = max(rounded, weight.padded)
        return cls(
            partial=torch.empty(partial, dtype=torch.float32, device=device),
            arrived=torch.zeros(arrived, dtype=torch.int32, device=device),
            wide=torch.empty(0 if deterministic else wide, dtype=dtype, device=device),
            rows=torch.empty(most_tokens * rounded, dtype=torch.int8, device=device),
            row_scales=torch.empty(most_tokens if rounded else 0, device=device),
        )

    def check(self, plan: ProductPlan, *, rounded: int = 0) -> None:
        """Raise ValueError if a product needs more, `rounded` bytes of rows among it."""
        found = (self.partial.numel(), self.arrived.numel(), self.rows.numel())
        needed = (plan.partial_sums, plan.blocks if plan.partial_sums else 0, rounded)
        if any(one < other for one, other in zip(found, needed, strict=True)):
            raise ValueError(f"workspace: sums, counters, rows {found}: must be at least {needed}")


def workspace_for(
    plan: ProductPlan, device: torch.device, *, tokens: int = 0, padded: int = 0
) -> LinearWorkspace:
    """For one launch, with room for `tokens` rounded rows of `padded` inputs."""
    return LinearWorkspace(
        partial=torch.empty(plan.partial_sums, dtype=torch.float32, device=device),
        arrived=torch.zeros(plan.blocks, dtype=torch.int32, device=device),
        wide=torch.empty(0, device=device),
        rows=torch.empty(tokens * padded, dtype=torch.int8, device=device),
        row_scales=torch.empty(tokens, device=device),
    )


def single_weights(weights: Iterable[GpuLinear]) -> Iterator[Single]:
    """The weights, two of each that is two products."""
    for weight in weights:
        if isinstance(weight, LowRankWeight):
            yield from (weight.first, weight.second)
        else:
            yield weight


def token_classes(
    weights: Iterable[GpuLinear], gpu: Gpu, *, most_tokens: int, deterministic: bool
) -> list[int]:
    """Numbers of tokens, one for each way in which some product is cut up and compiled."""
    kinds = {_kind(weight): weight for weight in single_weights(weights)}
    known: set[object] = set()
    counts = []
    for tokens in _sizes(most_tokens):
        ways = {
            (kind, _way(weight, tokens, gpu, deterministic=deterministic))
            for kind, weight in kinds.items()
        }
        if ways - known:
            counts.append(tokens)
            known |= ways
    return counts


def _kind(weight: Single) -> tuple[object, ...]:
    """What products of a weight are planned by."""
    step = weight.step if isinstance(weight, TiledLinear | Int8Linear) else None
    return type(weight), weight.outputs, weight.inputs, step


def _way(weight: Single, tokens: int, gpu: Gpu, *, deterministic: bool) -> object:
    """What is compiled for a product; None where torch has it."""
    if not deterministic and isinstance(weight, DenseWeight):
        return None
    if not deterministic and isinstance(weight, TiledLinear):
        if suits_few(weight, tokens, gpu):
            return "few", launch_for("linear", "few", gpu, tokens=tokens, step=weight.step)[
                "tokens"
            ]
        if tokens > launch_for("linear", "choice", gpu)["tiled_tokens"]:
            return "written out"
    plan = plan_product(weight, tokens, gpu, deterministic=deterministic)
    return plan.block_tiles, plan.block_tokens, plan.splits, plan.apart


def _sizes(most_tokens: int) -> Iterable[int]:
    """Up to 64 every number, then every 64th: blocks of tokens are 64 or 128 then."""
    few = range(1, min(most_tokens, 64) + 1)
    return [*few, *range(128, most_tokens + 1, 64), most_tokens]
