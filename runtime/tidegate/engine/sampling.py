"""Sampling: logits to a token, in numpy. The reference that device samplers are tested against.

All stages, in order: what `tidegate.engine.shaping` does (bias, penalties, masks), temperature,
min-p, top-k, top-p over what is left, then one draw by inverse distribution over the kept tokens in
order of their id. Greedy takes the largest after shaping. The draw for the token at position `p`
depends only on `(seed, p)`, never on the batch, so a request that was preempted, restarted or
handed to another backend gives the same tokens. Rows pay only for the stages they want.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from tidegate.engine.executor import Logits
from tidegate.engine.logprobs import score
from tidegate.engine.ranking import heaviest
from tidegate.engine.request import SamplingParams
from tidegate.engine.shaping import Draw, shaped

__all__ = ["Draw", "Sampled", "sample", "uniform"]

_Floats = npt.NDArray[np.float64]
_Ids = npt.NDArray[np.int64]

_PART: Final = 512
_FIRST_CUT: Final = 128
"""Tokens that top-p looks at first; a nucleus is rarely wider, and sorting 150k costs 10 ms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """A token that was chosen."""

    token: int = field(repr=False)
    logprob: float | None = None
    """How likely the model held it; None when nobody asked. See `tidegate.engine.logprobs`."""
    top: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    """The likeliest tokens and their logprobs, likeliest first, as many as were asked for."""


def sample(logits: Logits, draws: Sequence[Draw]) -> list[Sampled | None]:
    """The next token of each row; None for a row whose logits are not numbers.

    Args:
        logits: [B, V] as the model gave them; minus infinity excludes a token.
        draws: B of them.
    """
    greedy = logits.argmax(axis=1)  # the lowest id among equals
    peaks = np.take_along_axis(logits, greedy[:, None], axis=1)[:, 0]
    finite = np.isfinite(peaks)  # NaN wins argmax, so it shows here
    return [
        _choose(logits[row], draw, int(greedy[row])) if finite[row] else None
        for row, draw in enumerate(draws)
    ]


def _choose(logits: Logits, draw: Draw, likeliest: int) -> Sampled | None:
    wanted, params = logits, draw.params
    if draw.allowed is not None and not draw.ends:
        return _choose_allowed(logits, draw, draw.allowed)
    if not draw.is_plain:
        wanted = shaped(logits, draw)
        likeliest = int(wanted.argmax())
        if not np.isfinite(wanted[likeliest]):
            return None
    token = likeliest if params.temperature == 0 else _sample_row(wanted, draw)
    return _sampled(logits, token, params)


def _choose_allowed(logits: Logits, draw: Draw, mask: npt.NDArray[np.uint32]) -> Sampled | None:
    """As `_choose` among the tokens of a mask alone, by the order of their ids.

    The same as with minus infinity for all others, whose exponentials cost more than any number's:
    at 152k tokens a tenth of the time where few are allowed, half of it where most are.
    """
    bits = np.unpackbits(mask.view(np.uint8), count=len(logits), bitorder="little")
    ids = np.flatnonzero(bits.view(np.bool_))
    free = replace(draw, allowed=None)
    wanted = (logits if free.is_plain else shaped(logits, free))[ids]
    if not len(ids) or not np.isfinite(wanted.max()):
        return None
    at = int(wanted.argmax()) if draw.params.temperature == 0 else _sample_row(wanted, free)
    return _sampled(logits, int(ids[at]), draw.params)


def _sampled(logits: Logits, token: int, params: SamplingParams) -> Sampled:
    if params.logprobs is None:
        return Sampled(token=token)
    logprob, top = score(logits, token, params.logprobs)
    return Sampled(token=token, logprob=logprob, top=top)


_WORD: Final = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends only on its arguments (Philox, Salmon et al. 2011)."""
    words = [position & _WORD, 0, 0, 0]
    raw = np.random.Philox(key=seed & _WORD, counter=words).random_raw()
    return int(raw >> 11) * 2.0**-53


def _sample_row(logits: Logits, draw: Draw) -> int:
    params = draw.params
    ids = _candidates(logits, params)
    weights = _weights(logits if ids is None else logits[ids], params.temperature)
    if params.min_p > 0:
        weights[weights < params.min_p] = 0.0  # the largest is 1
    if params.top_p < 1:
        ids, weights = _nucleus(logits, ids, weights, params.top_p)
    if ids is None:
        return _locate(weights, uniform(draw.seed, draw.position))
    order = np.argsort(ids)
    return int(ids[order[_locate(weights[order], uniform(draw.seed, draw.position))]])


def _candidates(logits: Logits, params: SamplingParams) -> _Ids | None:
    """Tokens that top-k and min-p may keep, heaviest first; None for all."""
    if params.top_k is not None:
        return heaviest(logits, params.top_k)
    if params.min_p == 0:
        return None
    # A little generous: the weights decide, once they are known.
    bound = float(logits.max()) + params.temperature * math.log(params.min_p) - 1e-3
    ids = np.flatnonzero(logits >= np.float32(bound))
    if len(ids) > len(logits) // 8:
        return None
    return ids[np.argsort(-logits[ids], kind="stable")]


def _weights(logits: Logits, temperature: float) -> _Floats:
    """Probabilities up to a factor, in float64; the largest is 1."""
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()
    scaled /= temperature
    return np.asarray(np.exp(scaled, out=scaled))


def _nucleus(
    logits: Logits, ids: _Ids | None, weights: _Floats, top_p: float
) -> tuple[_Ids, _Floats]:
    """The smallest set of heaviest tokens whose share of all (or of `ids`) reaches `top_p`."""
    goal, cut = top_p * float(weights.sum()), _FIRST_CUT
    while ids is None and cut < len(weights):
        head = heaviest(logits, cut)
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
