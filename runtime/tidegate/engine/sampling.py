"""Sampling: logits to a token, in numpy. The reference that device samplers are tested against.

Temperature, then top-k, then top-p over what is left, then one draw by inverse distribution over
the kept tokens in order of their id. The draw for the token at position `p` depends only on
`(seed, p)`, never on the batch, so a request that was preempted, restarted or handed to another
backend gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from tidegate.engine.executor import Logits
from tidegate.engine.request import SamplingParams

_Floats = npt.NDArray[np.float64]
_Ids = npt.NDArray[np.int64]

_FIRST_CUT: Final = 1024
"""Tokens that top-p looks at first; a nucleus is rarely wider, and sorting 150k costs 10 ms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One row's wish: how to choose, and `position`, the tokens before the one to choose."""

    params: SamplingParams
    seed: int
    position: int


def sample(logits: Logits, draws: Sequence[Draw]) -> list[int | None]:
    """The next token of each row; None for a row whose logits are not numbers.

    Args:
        logits: [B, V]; minus infinity excludes a token.
        draws: B of them.
    """
    greedy = logits.argmax(axis=1)  # the lowest id among equals
    peaks = np.take_along_axis(logits, greedy[:, None], axis=1)[:, 0]
    chosen: list[int | None] = []
    for row, draw in enumerate(draws):
        if not np.isfinite(peaks[row]):  # NaN wins argmax, so it shows here
            chosen.append(None)
        elif draw.params.temperature == 0:
            chosen.append(int(greedy[row]))
        else:
            chosen.append(_sample_row(logits[row], draw))
    return chosen


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends only on its arguments (Philox, Salmon et al. 2011)."""
    words = [position & _WORD, 0, 0, 0]
    raw = np.random.Philox(key=seed & _WORD, counter=words).random_raw()
    return int(raw >> 11) * 2.0**-53


_WORD: Final = 2**64 - 1


def _sample_row(logits: npt.NDArray[np.float32], draw: Draw) -> int:
    params = draw.params
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()
    scaled /= params.temperature
    ids, weights = None, np.exp(scaled)
    if params.top_k is not None and params.top_k < len(weights):
        ids = _heaviest(weights, params.top_k)
    if params.top_p < 1:
        ids = _nucleus(weights, ids, params.top_p)
    if ids is not None:
        ids = np.sort(ids)
        weights = weights[ids]
    sums = np.cumsum(weights)
    index = int(np.searchsorted(sums, uniform(draw.seed, draw.position) * sums[-1], side="right"))
    # Rounding may reach the total itself; the last token with any weight is then meant.
    index = min(index, int(np.searchsorted(sums, sums[-1], side="left")))
    return index if ids is None else int(ids[index])


def _heaviest(weights: _Floats, k: int) -> _Ids:
    """Ids of the `k` largest weights, largest first; of equal ones the lowest ids are kept."""
    threshold = np.partition(weights, -k)[-k]
    ids = np.flatnonzero(weights >= threshold)
    return ids[np.argsort(-weights[ids], kind="stable")[:k]]


def _nucleus(weights: _Floats, ids: _Ids | None, top_p: float) -> _Ids:
    """The smallest set of heaviest tokens whose share of all (or of `ids`) reaches `top_p`."""
    if ids is not None:
        kept = _reaching(weights[ids], top_p * float(weights[ids].sum()))
        return ids[: len(ids) if kept is None else kept]
    goal, cut = top_p * float(weights.sum()), _FIRST_CUT
    while cut < len(weights):
        ids = _heaviest(weights, cut)
        if (kept := _reaching(weights[ids], goal)) is not None:
            return ids[:kept]
        cut *= 8
    ids = np.argsort(-weights, kind="stable")
    return ids[: _reaching(weights[ids], goal)]


def _reaching(descending: _Floats, goal: float) -> int | None:
    """How many of the first weights sum to `goal`, at least one; None when all do not."""
    sums = np.cumsum(descending)
    index = int(np.searchsorted(sums, goal, side="left"))
    return index + 1 if index < len(sums) else None
