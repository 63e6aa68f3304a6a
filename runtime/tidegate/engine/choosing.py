"""`choose`: a step's logits to tokens, for rows that guess ahead or follow a grammar too.

A row that guessed `draft` tokens has logits for every position from the guess on. Position by
position the token is chosen as if nothing had been guessed, with the draw and the mask of that
position, and the guess holds as long as it names the same token. So a guess changes how many
tokens a step gives and never which ones, whatever the temperature.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tidegate.engine.executor import Logits, Tokens
from tidegate.engine.sampling import Draw, Sampled, sample
from tidegate.errors import ExecutionError, TidegateError, describe_defect

_log = logging.getLogger(__name__)

Mask = npt.NDArray[np.uint32]
"""Which tokens may follow: bit `t % 32` of word `t // 32`, ceil(V / 32) words."""

_NO_TOKENS: Tokens = np.empty(0, np.int64)


class Guide(Protocol):
    """What one answer may say: a grammar's state, moved on by every token that is chosen."""

    def mask(self) -> Mask:
        """The tokens that may be chosen now; valid until the next call."""

    def accept(self, token: int) -> None:
        """Move on by a token that the mask allowed."""

    def accept_some(self, tokens: Sequence[int]) -> int:
        """Move on by the first of `tokens` that `mask` would allow one by one; how many.

        May stop before one that is allowed, so what comes next has to be asked of `mask`.
        """

    def forced(self) -> Tokens:
        """Tokens that must come next, one after the other: a guess that always holds."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ask:
    """One row's wish: up to `1 + len(draft)` tokens, one for each of its logits."""

    draw: Draw
    """How to choose the first; the later ones follow from it."""
    draft: Tokens = field(default_factory=lambda: _NO_TOKENS, repr=False)
    guide: Guide | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What came of an ask: at least one token, all but the last as guessed; or an error."""

    sampled: tuple[Sampled, ...] = ()
    error: TidegateError | None = None


def choose(logits: Logits, asks: Sequence[Ask]) -> tuple[Choice, ...]:
    """Choose the tokens of every row of a step. One row's trouble is its own.

    Guides move on by what is chosen, so an error is an error of rows and never of the step.

    Args:
        logits: [sum of 1 + len(draft), V], in the order of `asks`.
        asks: what each row wants.
    """
    starts = list(accumulate((1 + len(ask.draft) for ask in asks), initial=0))
    choices: dict[int, Choice] = {}
    draws: dict[int, Draw] = {}
    for i, ask in enumerate(asks):
        alone = ask.guide is not None or len(asks) == 1
        if len(ask.draft) or (alone and _is_likeliest(ask.draw)):
            rows = logits[starts[i] : starts[i + 1]]
            choices[i] = guarded(partial(_follow, rows, ask))
        else:
            draw = guarded(partial(_masked, ask.draw, ask.guide))
            if isinstance(draw, Choice):
                choices[i] = draw
            else:
                draws[i] = draw
    # One position of each row that guessed nothing, all at once.
    rows = logits if len(draws) == len(logits) else logits[[starts[i] for i in draws]]
    for i, one in zip(draws, _sampled(rows, list(draws.values())), strict=True):
        choices[i] = (
            one if isinstance(one, Choice) else guarded(partial(accepted, one, asks[i].guide))
        )
    return tuple(choices[i] for i in range(len(asks)))


_T = TypeVar("_T")


def guarded(work: Callable[[], _T]) -> _T | Choice:
    """What `work` returns; what goes wrong in it is the trouble of one row."""
    try:
        return work()
    except Exception as error:  # the boundary of one request: its grammar
        if isinstance(error, TidegateError):
            return Choice(error=error)
        _log.error("choosing a token failed: %s", describe_defect(error))
        return Choice(error=ExecutionError(f"choosing a token failed: {type(error).__name__}"))


def _sampled(logits: Logits, draws: Sequence[Draw]) -> Sequence[Sampled | Choice | None]:
    """A token for each row; if that fails for all together, row by row."""
    together = guarded(partial(sample, logits, draws))
    if not isinstance(together, Choice):
        return together
    alone = [
        guarded(partial(sample, logits[i : i + 1], draws[i : i + 1])) for i in range(len(draws))
    ]
    return [one if isinstance(one, Choice) else one[0] for one in alone]


def _masked(draw: Draw, guide: Guide | None) -> Draw:
    return draw if guide is None else replace(draw, allowed=guide.mask())


def accepted(one: Sampled | None, guide: Guide | None) -> Choice:
    """What a row gets of a token, None for logits that are not numbers; moves its guide on."""
    if one is None:
        return Choice(error=ExecutionError("the model gave logits that are not numbers"))
    if guide is not None:
        guide.accept(one.token)
    return Choice(sampled=(one,))


def _follow(logits: Logits, ask: Ask) -> Choice:
    """The tokens of one row, position by position, until one is not the guessed one.

    Trouble at a later position than the first is left to the next step, which meets it again
    unless the answer has ended before it.
    """
    found = _likeliest(logits, ask) if _is_likeliest(ask.draw) else []
    if found and (len(found) == len(logits) or found[-1].token != ask.draft[len(found) - 1]):
        return Choice(sampled=tuple(found))
    draw = ask.draw
    for taken in found:
        draw = draw.after(taken.token)
    for place in range(len(found), len(logits)):
        one = guarded(partial(_next, logits[place : place + 1], draw, ask.guide))
        if isinstance(one, Choice):
            return Choice(sampled=tuple(found)) if found else one
        found.append(one)
        if place == len(ask.draft) or one.token != ask.draft[place]:
            break
        draw = draw.after(one.token)
    return Choice(sampled=tuple(found))


def _is_likeliest(draw: Draw) -> bool:
    """Whether what is chosen is the likeliest token, of those that a grammar allows."""
    return draw.is_plain and draw.params.temperature == 0 and draw.params.logprobs is None


def _likeliest(logits: Logits, ask: Ask) -> list[Sampled]:
    """As many tokens as the likeliest of each position are all there is to choose.

    The likeliest of all is the likeliest of those allowed when it is one of them, so no mask has to
    be computed. All positions at once: the same as one by one, at a tenth of the time.
    """
    chosen: list[int] = []
    for place, (token, guess) in enumerate(
        zip(logits.argmax(axis=1).tolist(), (*ask.draft.tolist(), None), strict=True)
    ):
        if not math.isfinite(logits[place, token]):  # NaN wins argmax, so it shows here
            break
        chosen.append(token)
        if token != guess:
            break
    taken = len(chosen) if ask.guide is None else ask.guide.accept_some(chosen)
    return [Sampled(token=token) for token in chosen[:taken]]


def _next(logits: Logits, draw: Draw, guide: Guide | None) -> Sampled:
    (one,) = sample(logits, [_masked(draw, guide)])
    choice = accepted(one, guide)
    if choice.error is not None:
        raise choice.error
    return choice.sampled[0]
