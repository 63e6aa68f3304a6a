"""How a step's experts are cut into blocks: decided on the host from shapes alone.

Few pairs are a block each, unsorted: at one token no two have the same expert, and sorting would
cost more than it saves. Otherwise a block is up to `tokens` pairs of one expert, and there are as
many blocks as the worst case needs; those that are not needed end at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from tidegate.kernels.launch import Gpu, launch_for


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsPlan:
    """Blocks of pairs, and of outputs of 64 * `tiles`."""

    direct: bool
    """Pairs are not sorted, and each is a block."""
    blocks: int
    tokens: int
    tiles: int
    num_warps: int
    num_stages: int


def plan_experts(*, pairs: int, experts: int, gpu: Gpu, deterministic: bool = False) -> ExpertsPlan:
    """Cut up `pairs` (at least 1) of tokens and experts; in one way if `deterministic`."""
    direct = not deterministic and pairs <= launch_for("moe", "choice", gpu)["direct_pairs"]
    each = 1 if direct else ceil(pairs / experts)
    kernel = "in_order" if deterministic else "products"
    launch = launch_for("moe", kernel, gpu, pairs_per_expert=each)
    tokens = launch["tokens"]
    return ExpertsPlan(
        direct=direct,
        blocks=pairs if direct else most_blocks(pairs, experts, tokens),
        tokens=tokens,
        tiles=launch["tiles"],
        num_warps=launch["num_warps"],
        num_stages=launch["num_stages"],
    )


def pair_classes(*, most_pairs: int, experts: int, gpu: Gpu) -> list[int]:
    """Numbers of pairs, one for each way in which their products are compiled."""
    bounds = [launch_for("moe", "choice", gpu)["direct_pairs"], 16 * experts]
    wanted = [1, *(bound + 1 for bound in bounds), most_pairs]
    return sorted({min(one, most_pairs) for one in wanted})


def most_blocks(pairs: int, experts: int, tokens: int) -> int:
    """Blocks of `tokens` pairs of one expert, if as many experts as can be leave one unfilled."""
    return min(pairs, pairs // tokens + min(pairs, experts))
