"""Scale estimation: integers and scales in turn, each the best for the other on the calibration.

For fixed integers the scales of a row's groups follow from a small least-squares system under the
Gram matrix H of the inputs, all groups of the row at once, so that one may make up for another;
with the new scales the weight is rounded again. It starts from the clip search, and each row keeps
the best it ever had. Zero-points stay as searched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from tidegate.converters.passes.base import Block, BlockData
from tidegate.converters.rounding.block_packing import nearest, pack_block, searched
from tidegate.converters.rounding.feedback import (
    Feedback,
    factorise,
    pick_rows,
    round_with_feedback,
    row_errors,
    with_integers,
)
from tidegate.converters.rounding.grid import Grid, round_to
from tidegate.errors import ConfigError
from tidegate.model.packed import Bytes, DenseLinear, PackedLinear
from tidegate.model.recipe import Format
from tidegate.model.registry import AnyArchitecture

NEEDS_DATA = True
PACKS = True

_CHUNK_VALUES = 1 << 24
"""Of the largest intermediate, 64 MiB of float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to refine."""

    iterations: int = 3
    """Turns of scales and integers; later ones hardly change a row."""
    rounding: Literal["feedback", "nearest"] = "feedback"
    """Integers as GPTQ rounds, or each to nearest."""
    damping: float = 0.01
    """See `tidegate.converters.passes.gptq.Options`."""

    def __post_init__(self) -> None:
        if not 1 <= self.iterations <= 100:
            raise ConfigError("iterations", self.iterations, "from 1 to 100")
        if self.rounding not in ("feedback", "nearest"):
            raise ConfigError("rounding", self.rounding, "feedback or nearest")
        if not 0 < self.damping <= 1:
            raise ConfigError("damping", self.damping, "above 0 and at most 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class _ScaleEstimation:
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
            feedback = None
            if self.options.rounding == "feedback":
                feedback = factorise(gram, self.options.damping)
                if feedback is None:
                    block.notes[role] = (
                        "its Gram matrix is not positive definite: rounded to nearest"
                    )
                    return searched(block, role, linear, wanted, None)
            return refine(linear, wanted, gram, feedback, self.options.iterations)

        pack_block(block, self.match, pack)


def make(options: Options, match: tuple[str, ...]) -> _ScaleEstimation:
    """The pass for the roles that match."""
    return _ScaleEstimation(options=options, match=match)


def refine(
    linear: DenseLinear,
    wanted: Format,
    gram: torch.Tensor,
    feedback: Feedback | None,
    iterations: int,
) -> PackedLinear:
    """Pack a layer for inputs of Gram matrix [in, in]; to nearest without `feedback`."""
    weight = torch.from_numpy(linear.weight)
    aim = weight @ gram
    best = current = nearest(linear, wanted, gram.diagonal().numpy())
    least = row_errors(weight, best, gram)
    for turn in range(iterations + 1):
        if turn or feedback is None:
            current = with_scales(current, best_scales(aim, current, gram))
        if feedback is not None:
            integers = round_with_feedback(weight, current, feedback)
        else:
            integers = _nearest_integers(linear, current)
        current = with_integers(current, integers)
        best, least = _better(best, least, current, row_errors(weight, current, gram))
    current = with_scales(current, best_scales(aim, current, gram))
    return _better(best, least, current, row_errors(weight, current, gram))[0]


def _better(
    best: PackedLinear, least: torch.Tensor, current: PackedLinear, errors: torch.Tensor
) -> tuple[PackedLinear, torch.Tensor]:
    """Row by row the one that errs less, and how much."""
    return pick_rows(best, current, errors < least), torch.minimum(errors, least)


def best_scales(aim: torch.Tensor, linear: PackedLinear, gram: torch.Tensor) -> torch.Tensor:
    """The scales [out, groups] of least `(w - q) H (w - q)^T` for the integers as they are.

    A scale that would not be positive stays as it is.

    Args:
        aim: the weight times the Gram matrix, [out, in].
        linear: its integers and scales.
        gram: H, [in, in].
    """
    missing = linear.groups * linear.group_size - linear.inputs
    padded = torch.nn.functional.pad(gram, (0, missing, 0, missing)) if missing else gram
    blocks = padded.view(linear.groups, linear.group_size, -1)
    target = torch.nn.functional.pad(aim, (0, missing))
    old = torch.from_numpy(linear.scales)
    centre = torch.from_numpy(_centres(linear))
    units = torch.from_numpy(linear.integers()).float() - centre
    found = [
        _solve(units[rows], blocks, target[rows], old[rows]) for rows in _chunks(units, padded)
    ]
    scales = torch.cat(found)
    return torch.where(scales > 0, scales, old)


def _solve(
    units: torch.Tensor, blocks: torch.Tensor, target: torch.Tensor, old: torch.Tensor
) -> torch.Tensor:
    """Least squares for some rows: units [n, G, S], blocks [G, S, in], target [n, in]."""
    spread = torch.einsum("ngs,gsi->ngi", units, blocks)
    wide = spread.view(len(units), units.shape[1], units.shape[1], units.shape[2])
    system = torch.einsum("nghs,nhs->ngh", wide, units)
    right = (target.view(units.shape) * units).sum(dim=-1)
    # A group of zeros has no scale to find; a slight pull to the old one keeps it and the rest.
    ridge = 1e-4 * system.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True) + 1e-20
    system.diagonal(dim1=1, dim2=2).add_(ridge)
    solved: torch.Tensor = torch.linalg.solve(system, right + ridge * old)
    return solved


def _chunks(units: torch.Tensor, padded: torch.Tensor) -> Iterator[slice]:
    step = max(_CHUNK_VALUES // (units.shape[1] * len(padded)), 1)
    for first in range(0, len(units), step):
        yield slice(first, first + step)


def with_scales(linear: PackedLinear, scales: torch.Tensor) -> PackedLinear:
    """The same integers with other scales, rounded to float16 as a bundle keeps them."""
    kept = scales.clamp(2.0**-24, float(np.finfo(np.float16).max)).half().float().numpy()
    return with_integers(linear, linear.integers(), kept)


def _nearest_integers(linear: DenseLinear, start: PackedLinear) -> Bytes:
    missing = start.groups * start.group_size - start.inputs
    shape = (start.outputs, start.groups, start.group_size)
    grouped = np.pad(linear.weight, ((0, 0), (0, missing))).reshape(shape)
    grid = Grid(scales=start.scales, zeros=start.zeros, bits=start.bits)
    return round_to(grouped, grid).astype(np.uint8)


def _centres(linear: PackedLinear) -> np.ndarray:
    if linear.zeros is None:
        return np.full((1, 1, 1), linear.symmetric_zero, np.float32)
    return linear.zeros.astype(np.float32)[..., None]
