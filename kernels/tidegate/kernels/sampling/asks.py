"""`SamplingAsks`: what the rows of a step want, as tensors whose shapes do not depend on it.

Everything that changes the logits of single tokens is one ragged list of edits, each token of a row
at most once: a bias, how often the answer holds the token, and whether it may not end the answer
yet. The uniform number of a draw depends on seed and position alone, so the host brings it.

    numbers   float64 [B, 8]   the columns below; a row of temperature 0 takes the largest
    integers  int32 [B, 2]     top-k (0: all), and whether the row has a mask
    starts    int32 [B + 1]    where each row's edits begin
    edits     int32 [E, 4]     token, bias (bits of a float32), count, barred (0 or 1)
    masks     int32 [B, ceil(V / 32)]   bit `t % 32` of word `t // 32`: token t may be chosen

A count is -1 for a token that neither prompt nor answer holds, 0 for one that only the prompt does.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

Tensor = torch.Tensor


class Column(IntEnum):
    """What the columns of `numbers` are."""

    TEMPERATURE = 0
    MIN_P = 1
    TOP_P = 2
    UNIFORM = 3
    REPETITION = 4
    FREQUENCY = 5
    PRESENCE = 6


NUMBERS = 8
"""Columns of `numbers`; the last is not used, so that a row is 64 bytes."""


class Depth(IntEnum):
    """How much any row of a step needs at most; more is slower and never wrong."""

    GREEDY = 0
    DRAW = 1
    """Some row has a temperature."""
    CUT = 2
    """And top-k or top-p."""
    CUT_TWICE = 3
    """Or both."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class SamplingAsks:
    """See the module."""

    numbers: Tensor
    integers: Tensor
    depth: Depth
    starts: Tensor | None = None
    """None, as `edits`, when no row has any."""
    edits: Tensor | None = None
    masks: Tensor | None = None
    """None when no row has one."""

    @property
    def rows(self) -> int:
        """B."""
        return int(self.numbers.shape[0])
