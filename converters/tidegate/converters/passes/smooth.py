"""SmoothQuant: peaks of the activations are moved into the weights, which bear them better.

For backends that round activations to int8 as they go. Every input is divided by
`peak of input ** alpha / peak of its weights ** (1 - alpha)` (arXiv 2211.10438, equation 4) and
the weights that read it multiplied, through `tidegate.converters.rounding.folding`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tidegate.converters.passes.base import Block, BlockData
from tidegate.converters.rounding.folding import apply, reached
from tidegate.errors import ConfigError
from tidegate.model.packed import dense_weight
from tidegate.model.registry import AnyArchitecture

NEEDS_DATA = True

_SMALLEST_PEAK = 1e-5
"""Below it an input or a column of weights counts as unused, and its scale is 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How much to move."""

    alpha: float = 0.5
    """0 leaves the peaks in the activations, 1 moves them into the weights."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError("alpha", self.alpha, "from 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Smooth:
    options: Options
    match: tuple[str, ...]

    def apply(self, block: Block, arch: AnyArchitecture, data: BlockData | None) -> None:
        """See `BlockPass`."""
        assert data is not None
        for fold, peak in reached(arch, block, self.match, data.peak):
            weights = fold.shared(_weight_peaks(block, fold.readers))
            apply(block, fold, _scales(fold.shared(peak), weights, self.options.alpha))


def make(options: Options, match: tuple[str, ...]) -> _Smooth:
    """The pass for the roles that match."""
    return _Smooth(options=options, match=match)


def _weight_peaks(block: Block, readers: tuple[str, ...]) -> torch.Tensor:
    """The largest magnitude of each column over all readers, [in]."""
    peaks = [
        torch.from_numpy(dense_weight(block.linears[role])).abs().amax(dim=0) for role in readers
    ]
    return torch.stack(peaks).amax(dim=0)


def _scales(activation: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    used = (activation > _SMALLEST_PEAK) & (weights > _SMALLEST_PEAK)
    scales = activation**alpha / weights ** (1 - alpha)
    return torch.where(used, scales, torch.ones_like(scales))
