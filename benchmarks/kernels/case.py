"""`Case`: one kernel at one shape, what it has to be compared with and what it is held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

Kind = Literal["baseline", "copy", "tflops"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """What a case has to reach: times faster than the baseline, share of copy, or TFLOP/s."""

    kind: Kind
    at_least: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Work:
    """A case whose tensors are there."""

    run: Callable[[], object]
    baseline: Callable[[], object] | None = None
    """What a team would call otherwise."""
    error: Callable[[], float] | None = None
    """How far the result is from float64 math, over what is allowed: at most 1."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """One measurement. Tensors are made when its turn comes, and freed after it."""

    name: str
    """With its sizes and types: `rms_norm bf16 16384x4096`."""
    make: Callable[[torch.device], Work]
    bytes_moved: int | None = None
    """What has to be read and written at least."""
    flops: int | None = None
    baseline: str = ""
    """What the baseline is, in words."""
    bars: tuple[Bar, ...] = field(default=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """What a figure of a report has to reach."""

    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, value: float) -> bool:
        """Whether `value` reaches it."""
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Report:
    """Something measured as a whole, in its own way: figures by name."""

    name: str
    measure: Callable[[torch.device], dict[str, float]]
    limits: tuple[Limit, ...] = field(default=())


def half_type(device: torch.device) -> torch.dtype:
    """What activations are: bf16; float16 where kernels are interpreted, which cannot do bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def worst(found: torch.Tensor, exact: torch.Tensor, allowed: float) -> float:
    """The largest difference over what is allowed, relative to the largest exact value."""
    difference = (found.double() - exact).abs().max() / exact.abs().max()
    return float(difference) / allowed
