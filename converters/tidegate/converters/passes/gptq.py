"""GPTQ: round columns one after another, each making up for the errors of those before it.

Grids are searched up front for every group, weighted by the diagonal of the Gram matrix of the
inputs. A row whose error on the calibration is not lowered keeps its nearest integers, so no row
is worse than rounding to nearest on the same grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tidegate.converters.passes.base import Block, BlockData
from tidegate.converters.rounding.block_packing import nearest, pack_block, searched
from tidegate.converters.rounding.feedback import (
    better_rows,
    factorise,
    round_with_feedback,
    with_integers,
)
from tidegate.errors import ConfigError
from tidegate.model.packed import DenseLinear, PackedLinear
from tidegate.model.recipe import Format
from tidegate.model.registry import AnyArchitecture

NEEDS_DATA = True
PACKS = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to factorise."""

    damping: float = 0.01
    """Share of the mean of the Gram matrix's diagonal that is added to it (GPTQ's own default)."""

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ConfigError("damping", self.damping, "above 0 and at most 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gptq:
    options: Options
    match: tuple[str, ...]

    def apply(self, block: Block, arch: AnyArchitecture, data: BlockData | None) -> None:
        """See `BlockPass`."""

        def pack(role: str, linear: DenseLinear, wanted: Format) -> PackedLinear:
            assert data is not None
            try:
                gram = data.gram(role)
            except LookupError:
                return searched(block, role, linear, wanted, data)
            packed = quantise_with_gram(linear, wanted, gram, self.options.damping)
            if packed is None:
                block.notes[role] = "its Gram matrix is not positive definite: rounded to nearest"
                return searched(block, role, linear, wanted, None)
            return packed

        pack_block(block, self.match, pack)


def make(options: Options, match: tuple[str, ...]) -> _Gptq:
    """The pass for the roles that match."""
    return _Gptq(options=options, match=match)


def quantise_with_gram(
    linear: DenseLinear, wanted: Format, gram: torch.Tensor, damping: float
) -> PackedLinear | None:
    """A layer rounded for inputs of Gram matrix [in, in]; None when that is indefinite."""
    feedback = factorise(gram, damping)
    if feedback is None:
        return None
    start = nearest(linear, wanted, gram.diagonal().numpy())
    weight = torch.from_numpy(linear.weight)
    fed = with_integers(start, round_with_feedback(weight, start, feedback))
    return better_rows(weight, gram, start, fed)
