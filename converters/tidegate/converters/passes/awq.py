"""AWQ: inputs that are often large get finer steps, by scaling them up before weights are rounded.

Scales are powers of the mean magnitude of the inputs (arXiv 2306.00978); the power is searched for
the least error of the outputs on a sample of the calibration, and the scales are folded into what
makes the inputs (`rounding.folding`). The weights stay float: a pass behind packs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tidegate.converters.passes.base import Block, BlockData
from tidegate.converters.rounding.folding import Fold, apply, reached
from tidegate.converters.rounding.rtn import quantise
from tidegate.errors import ConfigError
from tidegate.model.packed import DenseLinear, dense_weight
from tidegate.model.recipe import Format, matches
from tidegate.model.registry import AnyArchitecture

NEEDS_DATA = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How finely to search."""

    steps: int = 20
    """Powers tried above 0, evenly up to 1; 20 as in the paper."""

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 100:
            raise ConfigError("steps", self.steps, "from 1 to 100")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Awq:
    options: Options
    match: tuple[str, ...]

    def apply(self, block: Block, arch: AnyArchitecture, data: BlockData | None) -> None:
        """See `BlockPass`."""
        assert data is not None
        for fold, magnitude in reached(arch, block, self.match, data.mean_abs):
            samples = _samples(block, data, fold, self.match)
            scales = self._search(block, fold, magnitude, samples)
            if scales is not None:
                apply(block, fold, scales)

    def _search(
        self,
        block: Block,
        fold: Fold,
        magnitude: torch.Tensor,
        samples: Mapping[str, torch.Tensor],
    ) -> torch.Tensor | None:
        """The scales of least error; None when none beats leaving the weights alone."""
        shared = fold.shared(magnitude).clamp_min(1e-4)
        best = None
        least = _error(block, samples, torch.ones_like(magnitude))
        for step in range(1, self.options.steps + 1):
            scales = shared ** (step / self.options.steps)
            scales = scales / (scales.max() * scales.min()).sqrt()
            error = _error(block, samples, fold.spread(scales))
            if error < least:
                best, least = scales, error
        return best


def make(options: Options, match: tuple[str, ...]) -> _Awq:
    """The pass for the roles that match."""
    return _Awq(options=options, match=match)


def _samples(
    block: Block, data: BlockData, fold: Fold, match: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """Inputs [n, in] of the layers that will be packed; experts no token reached are left out."""
    found = {}
    for role in fold.readers:
        if block.formats[role].bits != 32 and matches(role, match):
            try:
                found[role] = data.rows(role)
            except LookupError:
                continue
    return found


def _error(block: Block, samples: Mapping[str, torch.Tensor], scales: torch.Tensor) -> float:
    """Sum of squares of the outputs' error when inputs are scaled by `scales` [in] and packed."""
    total = 0.0
    for role, rows in samples.items():
        weight = torch.from_numpy(dense_weight(block.linears[role]))
        rounded = _rounded(weight * scales, block.formats[role])
        total += float((rows @ (rounded / scales - weight).T).square().sum())
    return total


def _rounded(weight: torch.Tensor, wanted: Format) -> torch.Tensor:
    assert wanted.bits != 32
    packed = quantise(
        DenseLinear(weight=weight.numpy()),
        bits=wanted.bits,
        group_size=wanted.group_size,
        symmetric=wanted.symmetric,
    )
    return torch.from_numpy(packed.dequantise())
