"""`Drafter`: guesses the tokens that come next, for one step to verify instead of one at a time.

A guess never changes an answer (`tidegate.engine.choosing`), so a drafter may be wrong; it only
has to be cheap. All of it runs in the thread of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tidegate.engine.choosing import Guide
from tidegate.engine.executor import Tokens
from tidegate.engine.scheduler import Key


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Wish:
    """A request that would have its next tokens guessed."""

    key: Key
    tokens: Tokens = field(repr=False)
    """Prompt and answer so far; of one key they only ever grow."""
    most: int
    """Tokens that may be guessed; 0 for a request that only passes by, as in prefill."""
    guide: Guide | None = None
    """The grammar that the answer follows."""
    shared: bool = True
    """Answers to others may serve as guesses, and its own for theirs."""
    remaining: int = 0
    """Tokens that the answer may still have."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ended:
    """A request whose answer has ended."""

    key: Key
    tokens: Tokens = field(repr=False)
    prompt_tokens: int
    shared: bool = True
    """As in `Wish`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """Guessed tokens; `kind` tells guesses apart that hold differently often."""

    kind: str = ""
    tokens: tuple[int, ...] = field(default=(), repr=False)
    likely: float = 0.7
    """The chance of each to hold, once those before it did, for as long as nothing of this kind was
    measured: high enough to try, and a few steps correct it."""
    padding: int = 0
    """The last so many of `tokens` only fill up a step; nothing is learnt from them."""

    def cut(self, tokens: int) -> Draft:
        """The first `tokens` of it."""
        if tokens >= len(self.tokens):
            return self
        return Draft(kind=self.kind, tokens=self.tokens[:tokens], likely=self.likely)

    def sized(self, tokens: int) -> Draft:
        """Exactly so many tokens: the first of it, or its last again and again for padding."""
        missing = tokens - len(self.tokens)
        if missing <= 0:
            return self.cut(tokens)
        filled = (*self.tokens, *self.tokens[-1:] * missing)
        return Draft(kind=self.kind, tokens=filled, likely=self.likely, padding=missing)


NOTHING = Draft()


class Drafter(Protocol):
    """One way to guess. Keeps state of its own per key, bounded, and may forget any of it."""

    def propose(self, wishes: Sequence[Wish]) -> list[Draft]:
        """A draft for each wish, of at most `most` tokens; `NOTHING` where it has no idea."""

    def observe(self, key: Key, accepted: int) -> None:
        """So many tokens of the last draft for `key` held."""

    def remember(self, ended: Ended) -> None:
        """A request is gone: its state may go, and its answer may help to guess others."""


class PaidDrafter(Drafter, Protocol):
    """A drafter that costs so much that it is asked only when its guesses will be verified."""

    @property
    def caught_up(self) -> int:
        """Tokens the last `propose` computed that it will not compute again for the next."""

    def catch_up_s(self, wish: Wish) -> float:
        """Seconds until it could guess for a request, beyond what a guess takes."""

    def unload(self) -> None:
        """Give its memory back until it is asked again, if it can; no request runs."""


class GrammarDrafter:
    """What a request's grammar leaves no choice about."""

    def propose(self, wishes: Sequence[Wish]) -> list[Draft]:
        """See `Drafter.propose`."""
        return [self._propose(wish) for wish in wishes]

    def observe(self, key: Key, accepted: int) -> None:
        """Nothing to learn: the grammar hears of every token by itself."""

    def remember(self, ended: Ended) -> None:
        """Nothing to keep: the grammar went with its request."""

    def _propose(self, wish: Wish) -> Draft:
        if wish.guide is None or wish.most < 1:
            return NOTHING
        forced = wish.guide.forced()[: wish.most]
        if not len(forced):
            return NOTHING
        return Draft(kind="grammar", tokens=tuple(forced.tolist()), likely=0.95)
