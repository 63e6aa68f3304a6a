"""How a product over tiles is cut up: decided on the host from shapes alone.

Splits are what makes a product of few tokens fast, and they change the order of its sums, as the
size of blocks may, which picks the instructions that multiply. With `deterministic` both depend on
the weight and the GPU only; a product of many tokens then goes through all splits in one program,
which adds them up in the same order. Splits are powers of two, so that there are few to compile.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from tidegate.kernels.launch import Gpu, launch_for
from tidegate.kernels.linear.int8 import Int8Linear
from tidegate.kernels.linear.weights import TILE_ROWS, DenseWeight, Single, TiledLinear

LEAST_INPUTS = 256
"""Of a split: two to sixteen tiles, whose loads are all under way at once."""
DENSE_STEP = 64
"""Inputs that a dense product reads at a time: 128 bytes of a row, whatever the block."""

_KERNEL = {TiledLinear: "tiled", DenseWeight: "dense", Int8Linear: "int8"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductPlan:
    """A grid of `output_blocks` x `splits` (or 1 if not `apart`) x `token_blocks` programs."""

    block_tiles: int
    block_tokens: int
    output_blocks: int
    token_blocks: int
    splits: int
    apart: bool
    """Whether every split has a program of its own."""
    num_warps: int
    num_stages: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Of the launch."""
        return self.output_blocks, self.splits if self.apart else 1, self.token_blocks

    @property
    def blocks(self) -> int:
        """Counters of the workspace."""
        return self.output_blocks * self.token_blocks

    @property
    def partial_sums(self) -> int:
        """Float32 numbers of the workspace; 0 if there is nothing to add up."""
        if self.splits == 1 or not self.apart:
            return 0
        return self.blocks * self.splits * self.block_tiles * TILE_ROWS * self.block_tokens


def plan_product(
    weight: Single, tokens: int, gpu: Gpu, *, deterministic: bool = False
) -> ProductPlan:
    """Cut up the product of `tokens` rows (at least 1) with `weight`."""
    kernel = _KERNEL[type(weight)] + ("_in_order" if deterministic else "")
    launch = launch_for("linear", kernel, gpu, tokens=tokens)
    output_blocks = ceil(ceil(weight.outputs / TILE_ROWS) / launch["tiles"])
    token_blocks = ceil(tokens / launch["tokens"])
    programs = gpu.processors * launch["programs_per_processor"]
    splits = _splits(weight, programs / (output_blocks * (1 if deterministic else token_blocks)))
    return ProductPlan(
        block_tiles=launch["tiles"],
        block_tokens=launch["tokens"],
        output_blocks=output_blocks,
        token_blocks=token_blocks,
        splits=splits,
        apart=token_blocks == 1 or output_blocks * token_blocks * splits <= 2 * programs,
        num_warps=launch["num_warps"],
        num_stages=launch["num_stages"],
    )


def _splits(weight: Single, wanted: float) -> int:
    """About `wanted` splits, none of them empty or short, as even as whole tiles allow."""
    steps = ceil(weight.inputs / (DENSE_STEP if isinstance(weight, DenseWeight) else weight.step))
    most = max(1, weight.inputs // LEAST_INPUTS)
    near = 1 << max(0, round(log2(max(1, wanted))))
    per_split = ceil(steps / max(1, min(most, near)))
    return ceil(steps / per_split)
