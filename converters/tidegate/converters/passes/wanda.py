"""Wanda: the weights that matter least to the outputs become zero (Sun et al. 2023).

A weight's score is its magnitude times the root mean square of its input (arXiv:2306.11695,
equation 1), and every output row loses the same share; or two of every four (`pattern = "2:4"`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tidegate.converters.passes.base import Block, BlockData
from tidegate.converters.pruning.pruning import prune_block
from tidegate.converters.pruning.sparsity import Sparsity, lowest
from tidegate.model.packed import Array
from tidegate.model.registry import AnyArchitecture

NEEDS_DATA = True

Options = Sparsity


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanda:
    """`BlockPass` of kind `wanda`."""

    options: Sparsity
    match: tuple[str, ...]

    def apply(self, block: Block, arch: AnyArchitecture, data: BlockData | None) -> None:
        """See `BlockPass.apply`."""
        assert data is not None
        # All inputs are looked at before a weight changes: layers are pruned as they were seen.
        reach: dict[str, Array] = {}

        def scores(role: str, weight: Array) -> Array:
            return np.abs(weight) * reach[role]

        def look(role: str) -> None:
            reach[role] = data.mean_square(role).sqrt().numpy()

        prune_block(block, self.options, self.match, scores, lowest, look=look)


def make(options: Sparsity, match: tuple[str, ...]) -> Wanda:
    """See `tidegate.converters.passes.base.PassModule.make`."""
    return Wanda(options=options, match=match)
