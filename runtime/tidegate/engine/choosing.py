"""`choose`: a step's logits to tokens, for rows that guess ahead or follow a grammar too.

A row that guessed `draft` tokens has logits for every position from the guess on. Position by
position the token is chosen as if nothing had been guessed, with the draw and the mask of that
position, and the guess holds as long as it names the same token. So a guess changes how many
tokens a step gives and never which ones, whatever the temperature.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

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
        """The tokens that may be chosen now."""

    def accept(self, token: int) -> None:
        """Move on by a token that the mask allowed."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ask:
    """One row's wish: up to `1 + len(draft)` tokens, one for each of its logits."""

    draw: Draw
    """How to choose the first; the later ones follow from it."""
    draft: Tokens = field(default_factory=lambda: _NO_TOKENS)
    guide: Guide | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What came of an ask: at least one token, all but the last as guessed; or an error."""

    sampled: tuple[Sampled, ...] = ()
    error: TidegateError | None = None


def choose(logits: Logits, asks: Sequence[Ask]) -> tuple[Choice, ...]:
    """Choose the tokens of every row of a step. One row's trouble is its own.

    Args:
        logits: [sum of 1 + len(draft), V], in the order of `asks`.
        asks: what each row wants.
    """
    starts = np.cumsum([0, *(1 + len(ask.draft) for ask in asks)])
    plain = [i for i, ask in enumerate(asks) if not len(ask.draft) and ask.guide is None]
    together = sample(logits[starts[plain]], [asks[i].draw for i in plain])
    choices = {i: _choice([one]) for i, one in zip(plain, together, strict=True)}
    for i, ask in enumerate(asks):
        if i not in choices:
            choices[i] = _one_by_one(logits[starts[i] : starts[i + 1]], ask)
    return tuple(choices[i] for i in range(len(asks)))


def _one_by_one(logits: Logits, ask: Ask) -> Choice:
    """The tokens of one row, until one is not the guessed one."""
    try:
        return _choice(_follow(logits, ask))
    except Exception as error:  # the boundary of one request: its grammar
        if isinstance(error, TidegateError):
            return Choice(error=error)
        _log.error("choosing a token failed: %s", describe_defect(error))
        return Choice(error=ExecutionError(f"choosing a token failed: {type(error).__name__}"))


def _follow(logits: Logits, ask: Ask) -> list[Sampled | None]:
    found: list[Sampled | None] = []
    draw = ask.draw
    for place in range(len(logits)):
        if ask.guide is not None:
            draw = replace(draw, allowed=ask.guide.mask())
        one = sample(logits[place : place + 1], [draw])[0]
        found.append(one)
        if one is None:
            break
        if ask.guide is not None:
            ask.guide.accept(one.token)
        if place == len(ask.draft) or one.token != ask.draft[place]:
            break
        draw = draw.after(one.token)
    return found


def _choice(found: Sequence[Sampled | None]) -> Choice:
    """The tokens; a row one of whose logits are not numbers has none."""
    sampled = tuple(one for one in found if one is not None)
    if len(sampled) < len(found):
        return Choice(error=ExecutionError("the model gave logits that are not numbers"))
    return Choice(sampled=sampled)
