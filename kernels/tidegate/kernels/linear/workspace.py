"""Memory that products need beside their output, taken once for all layers of a model.

Layers run one behind the other on one stream, so one workspace serves all of them, and graphs that
were captured with it may be replayed. Counters are 0 between launches: whoever counts to the end
sets them back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tidegate.kernels.launch import gpu_of
from tidegate.kernels.linear.plan import plan_product
from tidegate.kernels.linear.weights import DenseWeight, GpuLinear, LowRankWeight, TiledLinear

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
        partial = arrived = wide = 0
        for weight in _single(weights):
            if isinstance(weight, DenseWeight) and not deterministic:
                continue
            for tokens in _sizes(most_tokens):
                plan = plan_product(weight, tokens, gpu, deterministic=deterministic)
                partial = max(partial, plan.partial_sums)
                arrived = max(arrived, plan.blocks if plan.partial_sums else 0)
            if isinstance(weight, TiledLinear):
                wide = max(wide, weight.outputs * weight.inputs)
        return cls(
            partial=torch.empty(partial, dtype=torch.float32, device=device),
            arrived=torch.zeros(arrived, dtype=torch.int32, device=device),
            wide=torch.empty(0 if deterministic else wide, dtype=dtype, device=device),
        )


def _single(weights: Iterable[GpuLinear]) -> Iterable[TiledLinear | DenseWeight]:
    for weight in weights:
        if isinstance(weight, LowRankWeight):
            yield from (weight.first, weight.second)
        else:
            yield weight


def _sizes(most_tokens: int) -> Iterable[int]:
    """Up to 64 every number, then every 64th: blocks of tokens are 64 or 128 then."""
    few = range(1, min(most_tokens, 64) + 1)
    return [*few, *range(128, most_tokens + 1, 64), most_tokens]
