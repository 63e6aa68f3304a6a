"""Sampling: logits to a token, in numpy. The reference that device samplers are tested against.

Temperature, then top-k, then top-p over what is left, then one draw by inverse distribution over
the kept tokens in order of their id. The draw for the token at position `p` depends only on
`(seed, p)`, never on the batch, so a request that was preempted, restarted or handed to another
backend gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from tidegate.engine.executor import Logits
from tidegate.engine.request import SamplingParams

_Floats = npt.NDArray[np.float64]
_Ids = npt.NDArray[np.int64]

_PART: Final = 512
_FIRST_CUT: Final = 1024
"""Tokens that top-p looks at first; a nucleus is rarely wider, and sorting 150k costs 10 ms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One row's wish: how to choose, and `position`, the tokens before the one to choose."""

    params: SamplingParams
    seed: int
    position: int
    allowed: npt.NDArray[np.uint32] | None = None
    """Tokens that may be chosen, bit `t % 32` of word `t // 32`; None for all."""

    def after(self, token: int) -> Draw:
        """The draw of the next position, once `token` was chosen here."""
        return replace(self, position=self.position + 1, allowed=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """A token that was chosen."""

    token: int


def sample(logits: Logits, draws: Sequence[Draw]) -> list[Sampled | None]:
    """The next token of each row; None for a row whose logits are not numbers.

    Args:
        logits: [B, V]; minus infinity excludes a token.
        draws: B of them.
    """
    logits = _masked(logits, draws)
    greedy = logits.argmax(axis=1)  # the lowest id among equals
    peaks = np.take_along_axis(logits, greedy[:, None], axis=1)[:, 0]
    chosen: list[Sampled | None] = []
    for row, draw in enumerate(draws):
        if not np.isfinite(peaks[row]):  # NaN wins argmax, so it shows here
            chosen.append(None)
        elif draw.params.temperature == 0:
            chosen.append(Sampled(token=int(greedy[row])))
        else:
            chosen.append(Sampled(token=_sample_row(logits[row], draw)))
    return chosen


def _masked(logits: Logits, draws: Sequence[Draw]) -> Logits:
    """Logits with minus infinity for what a draw does not allow; the same array if all is."""
    if all(draw.allowed is None for draw in draws):
        return logits
    masked = logits.copy()
    for row, draw in enumerate(draws):
        if draw.allowed is not None:
            bits = np.unpackbits(draw.allowed.view(np.uint8), bitorder="little")
            masked[row, bits[: logits.shape[1]] == 0] = -np.inf
    return masked


_WORD: Final = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends only on its arguments (Philox, Salmon et al. 2011)."""
    words = [position & _WORD, 0, 0, 0]
    raw = np.random.Philox(key=seed & _WORD, counter=words).random_raw()
    return int(raw >> 11) * 2.0**-53


def _sample_row(logits: Logits, draw: Draw) -> int:
    params = draw.params
    ids = _heaviest(logits, params.top_k) if params.top_k is not None else None
    weights = _weights(logits if ids is None else logits[ids], params.temperature)
    if params.top_p < 1:
        ids, weights = _nucleus(logits, ids, weights, params.top_p)
    if ids is None:
        return _locate(weights, uniform(draw.seed, draw.position))
    order = np.argsort(ids)
    return int(ids[order[_locate(weights[order], uniform(draw.seed, draw.position))]])


def _weights(logits: Logits, temperature: float) -> _Floats:
    """Probabilities up to a factor, in float64; the largest is 1."""
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()
    scaled /= temperature
    return np.asarray(np.exp(scaled, out=scaled))


def _heaviest(logits: Logits, k: int) -> _Ids:
    """Ids of the `k` largest, largest first; of equal ones the lowest ids are kept.

    The k-th largest of the maxima of parts is no more than the k-th largest of all, and sorts out
    nearly everything in one pass; a partition of 150k logits costs ten times as much.
    """
    part = max(1, len(logits) // (4 * k))
    maxima = np.maximum.reduceat(logits, np.arange(0, len(logits), part))
    bound = np.partition(maxima, -k)[-k] if k < len(maxima) else -np.inf
    ids = np.flatnonzero(logits >= bound)
    return ids[np.argsort(-logits[ids], kind="stable")[:k]]


def _nucleus(
    logits: Logits, ids: _Ids | None, weights: _Floats, top_p: float
) -> tuple[_Ids, _Floats]:
    """The smallest set of heaviest tokens whose share of all (or of `ids`) reaches `top_p`."""
    goal, cut = top_p * float(weights.sum()), _FIRST_CUT
    while ids is None and cut < len(weights):
        head = _heaviest(logits, cut)
        if (kept := _reaching(weights[head], goal)) is not None:
            return head[:kept], weights[head[:kept]]
        cut *= 8
    if ids is None:
        ids = np.argsort(-logits, kind="stable")
        weights = weights[ids]
    kept = _reaching(weights, goal)
    return ids[:kept], weights[:kept]


def _reaching(descending: _Floats, goal: float) -> int | None:
    """How many of the first weights sum to `goal`, at least one; None when all do not."""
    index = int(np.searchsorted(np.cumsum(descending), goal, side="left"))
    return index + 1 if index < len(descending) else None


def _locate(weights: _Floats, share: float) -> int:
    """Where the running sum first passes `share` of the total; by parts, then within one."""
    starts = np.arange(0, len(weights), _PART)
    sums = np.cumsum(np.add.reduceat(weights, starts))
    target = share * float(sums[-1])
    part = _first_beyond(sums, target)
    before = float(sums[part - 1]) if part else 0.0
    within = weights[part * _PART : (part + 1) * _PART]
    return part * _PART + _first_beyond(np.cumsum(within), target - before)


def _first_beyond(sums: _Floats, target: float) -> int:
    # Rounding may reach the total itself; the last one with any weight is then meant.
    last = int(np.searchsorted(sums, sums[-1], side="left"))
    return min(int(np.searchsorted(sums, target, side="right")), last)
