"""Magnitude pruning: the smallest weights of a layer become zero. Needs no data.

Unstructured, the share is of the whole layer, so rows of small weights lose more of them; or two
of every four (`pattern = "2:4"`). Zeros survive quantisation: 0 is on every group's grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tidegate.converters.passes.base import Block, BlockData
from tidegate.converters.pruning.pruning import prune_block
from tidegate.converters.pruning.sparsity import Sparsity, lowest
from tidegate.model.packed import Array
from tidegate.model.registry import AnyArchitecture

NEEDS_DATA = False

Options = Sparsity


@dataclass(frozen=True, kw_only=True, slots=True)
class Magnitude:
    """`BlockPass` of kind `magnitude`."""

    options: Sparsity
    match: tuple[str, ...]

    def apply(self, block: Block, arch: AnyArchitecture, data: BlockData | None) -> None:
        """See `BlockPass.apply`."""
        prune_block(block, self.options, self.match, _scores, _lowest_of_all)


def make(options: Sparsity, match: tuple[str, ...]) -> Magnitude:
    """See `tidegate.converters.passes.base.PassModule.make`."""
    return Magnitude(options=options, match=match)


def _scores(role: str, weight: Array) -> Array:
    return np.abs(weight)


def _lowest_of_all(scores: Array, share: float) -> npt.NDArray[np.bool_]:
    return lowest(scores.reshape(1, -1), share).reshape(scores.shape)
