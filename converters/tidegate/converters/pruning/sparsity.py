"""Which weights of a layer to set to zero: the lowest scores, all over it or 2 of every 4.

A score says how much a weight counts. Exactly the wanted number goes; among equal scores the
first ones, so that the same weights give the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tidegate.errors import ConfigError

Pattern = Literal["none", "2:4"]
"""`2:4` zeroes two of every four neighbouring inputs, which some hardware skips."""

Mask = npt.NDArray[np.bool_]

_GROUP, _GROUP_ZEROS = 4, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparsity:
    """How many weights become zero, and in what pattern; checks itself."""

    sparsity: float = 0.5
    """Share of the weights."""
    pattern: Pattern = "none"

    def __post_init__(self) -> None:
        if self.pattern not in ("none", "2:4"):
            raise ConfigError("pattern", self.pattern, "none or 2:4")
        if not 0 < self.sparsity < 1:
            raise ConfigError("sparsity", self.sparsity, "above 0 and below 1")
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ConfigError("sparsity", self.sparsity, "0.5 with pattern 2:4")


def lowest(scores: npt.NDArray[np.float32], share: float) -> Mask:
    """The `share` of each row [rows, n] with the lowest scores, rounded down to whole weights."""
    count = int(share * scores.shape[1])
    if count == 0:
        return np.zeros(scores.shape, np.bool_)
    limit = np.partition(scores, count - 1, axis=1)[:, count - 1, None]
    below, equal = scores < limit, scores == limit
    missing = count - below.sum(axis=1, keepdims=True)
    mask: Mask = below | (equal & (np.cumsum(equal, axis=1, dtype=np.int64) <= missing))
    return mask


def lowest_of_four(scores: npt.NDArray[np.float32]) -> Mask:
    """The two lowest scores of every four neighbours along the rows; [rows, a multiple of 4]."""
    fours = scores.reshape(-1, _GROUP)
    return lowest(fours, _GROUP_ZEROS / _GROUP).reshape(scores.shape)
