"""`Speculator`: adds guesses to a step before it runs, and learns from how they fared.

It lives in the thread of the steps. Forced tokens of a grammar come first, then what the drafters
say in their order; how much of it is verified, the policy decides (`speculation_policy`). A defect
in here costs the guesses of a step and never the step.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tidegate.engine.drafts import NOTHING, Draft, Drafter, Ended, Wish
from tidegate.engine.scheduler import Key
from tidegate.engine.speculation_policy import (
    KEPT_OF_ALL,
    KEPT_OF_ONE,
    Acceptance,
    Probing,
    Prospect,
    StepCosts,
    share_out,
)
from tidegate.errors import describe_defect

_log = logging.getLogger(__name__)

MOST_DRAFT_TOKENS: Final = 15
"""Of one row: with its own token a step of 16, which no executor here runs at the price of one."""

_MARGIN: Final = 1.02
"""Guessing must promise this much, since promises are made of noisy measurements."""
_PLAIN_EVERY: Final = 256
"""Steps in a row with guesses, then one without: what guessing is compared with has to be fresh."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Guessing:
    """Which rows of a step may guess."""

    wishes: tuple[Wish | None, ...]
    """One per row, None for a row that may not."""
    most: int
    """Tokens of all drafts together."""
    decoding: bool
    """No row computes a prompt, so that the step's time says what guesses cost."""


class Speculator:
    """The drafters of one engine, with what was learned about them."""

    def __init__(
        self, drafters: Sequence[Drafter], *, most_requests: int, eos_ids: frozenset[int]
    ) -> None:
        """Ask `drafters` in turn.

        Args:
            drafters: for each request the first that has an idea counts.
            most_requests: whose acceptance is remembered.
            eos_ids: tokens after which nothing is worth guessing.
        """
        self._drafters = drafters
        self._most_requests = most_requests
        self._eos_ids = eos_ids
        self._costs = StepCosts()
        self._probing = Probing()
        self._of_all: dict[str, Acceptance] = {}
        self._of_one: dict[Key, dict[str, Acceptance]] = {}
        self._ended: deque[Ended] = deque(maxlen=4 * most_requests)
        self._guessed_in_a_row = 0
        self._ran: tuple[int, int] | None = None

    def draft(self, guessing: Guessing) -> list[Draft]:
        """The drafts to verify, one per wish, cut to what pays."""
        rows = len(guessing.wishes)
        drafts = [NOTHING] * rows
        try:
            drafts = self._worthwhile(guessing)
        except Exception as error:  # guesses are a luxury: the step runs without
            _log.error("guessing tokens failed: %s", describe_defect(error))
        guessed = sum(len(draft.tokens) for draft in drafts)
        self._ran = (rows, guessed) if guessing.decoding else None
        return drafts

    def observe(self, guessing: Guessing, drafts: Sequence[Draft], held: Sequence[int]) -> None:
        """Learn that `held` tokens of each draft were what was chosen."""
        for wish, draft, accepted in zip(guessing.wishes, drafts, held, strict=True):
            if wish is None or not draft.tokens:
                continue
            of_all = self._of_all.setdefault(draft.kind, Acceptance(kept=KEPT_OF_ALL))
            of_one = self._book(wish.key).setdefault(draft.kind, Acceptance(kept=KEPT_OF_ONE))
            for acceptance in (of_all, of_one):
                acceptance.observe(len(draft.tokens), accepted)
            for drafter in self._drafters:
                drafter.observe(wish.key, accepted)

    def ended(self, ended: Ended) -> None:
        """A request is gone, maybe while a step runs: it is looked at before the next one."""
        self._ended.append(ended)

    def timed(self, seconds: float) -> None:
        """Learn how long the last step took, with all that the engine did around it."""
        if self._ran is not None:
            self._costs.observe(*self._ran, seconds)
        self._ran = None

    def _worthwhile(self, guessing: Guessing) -> list[Draft]:
        drafts = self._propose(guessing.wishes)
        costs = self._costs.table(len(drafts), guessing.most)
        if costs is None or not any(draft.tokens for draft in drafts):
            return [NOTHING] * len(drafts)
        prospects = [
            Prospect(tokens=len(draft.tokens), acceptance=self._acceptance(wish, draft))
            for wish, draft in zip(guessing.wishes, drafts, strict=True)
        ]
        lengths, gain = share_out(prospects, costs, len(drafts))
        if not self._go(gain):
            return [NOTHING] * len(drafts)
        return [draft.cut(tokens) for draft, tokens in zip(drafts, lengths, strict=True)]

    def _remember(self) -> None:
        while self._ended:
            ended = self._ended.popleft()
            self._of_one.pop(ended.key, None)
            for drafter in self._drafters:
                drafter.remember(ended)

    def _propose(self, wishes: Sequence[Wish | None]) -> list[Draft]:
        self._remember()
        drafts = [NOTHING] * len(wishes)
        for drafter in self._drafters:
            open_wishes = [
                (place, wish)
                for place, wish in enumerate(wishes)
                if wish is not None and not drafts[place].tokens
            ]
            found = drafter.propose([wish for _, wish in open_wishes])
            for (place, _), draft in zip(open_wishes, found, strict=True):
                drafts[place] = self._until_eos(draft)
        return drafts

    def _until_eos(self, draft: Draft) -> Draft:
        if self._eos_ids.isdisjoint(draft.tokens):
            return draft
        ends = (place for place, token in enumerate(draft.tokens) if token in self._eos_ids)
        return draft.cut(1 + next(ends))

    def _go(self, gain: float) -> bool:
        if gain < _MARGIN:
            self._guessed_in_a_row = 0
            return gain > 0 and self._probing.refuse()
        self._probing.won()
        self._guessed_in_a_row = (self._guessed_in_a_row + 1) % _PLAIN_EVERY
        return self._guessed_in_a_row > 0

    def _acceptance(self, wish: Wish | None, draft: Draft) -> float:
        if wish is None or not draft.tokens:
            return 0.0
        of_all = self._of_all.get(draft.kind)
        of_one = self._of_one.get(wish.key, {}).get(draft.kind)
        prior = (of_all or Acceptance()).rate()
        return prior if of_one is None else of_one.rate(prior)

    def _book(self, key: Key) -> dict[str, Acceptance]:
        book = self._of_one.pop(key, None) or {}
        self._of_one[key] = book  # the latest is the last
        if len(self._of_one) > self._most_requests:
            del self._of_one[next(iter(self._of_one))]
        return book
