"""`Speculator`: adds guesses to a step before it runs, and learns from how they fared.

It lives in the thread of the steps. Forced tokens of a grammar come first, then what the drafters
say in their order; how much of it is verified, the policy decides (`speculation_policy`). A defect
in here costs the guesses of a step and never the step.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from tidegate.engine.drafts import NOTHING, Draft, Drafter, Ended, PaidDrafter, Wish
from tidegate.engine.scheduler import Key
from tidegate.engine.speculation_alone import AloneCosts
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

_MARGIN: Final = 1.05
"""Guessing must promise this much, since promises are made of noisy measurements."""
_ANY: Final = ""
"""Drafts of any kind, in what one request has shown."""
PAID: Final = "model"
"""The kind of all that the paid drafter says."""
_USUAL_ANSWER_TOKENS: Final = 64
"""That a request may give at least; how long it will be, nobody knows."""
_PLAIN_EVERY: Final = 256
"""Steps in a row with guesses, then one without: what guessing is compared with has to be fresh."""

_LOOKS, _LOOKS_AGAIN, _REST = 256, 48, 512
"""Rows that were looked at in vain, first and after a rest; then nobody looks for so many steps."""
_LOOKS_WON: Final = 32
"""A token that held saves at least half a short step, which so many looks cost."""
_ROW_WEIGHT: Final = 0.02
"""Of the newest plain step."""
_SHORT_S: Final = 2.5e-3
"""Of a step and row. Looking takes about 15 us a row, which no longer step feels."""


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
        self,
        drafters: Sequence[Drafter],
        *,
        most_requests: int,
        eos_ids: frozenset[int],
        paid: PaidDrafter | None = None,
    ) -> None:
        """Ask `drafters` in turn, and `paid` about the rest.

        Args:
            drafters: for each request the first that has an idea counts.
            paid: asked only where that promises to be faster.
            most_requests: whose acceptance is remembered.
            eos_ids: tokens after which nothing is worth guessing.
        """
        self._drafters = drafters
        self._paid = paid
        self._everyone = (*drafters, paid) if paid is not None else tuple(drafters)
        self._paid_costs = StepCosts()
        self._paid_probing = Probing()
        self._paid_ran = False
        self._most_requests = most_requests
        self._eos_ids = eos_ids
        self._costs = StepCosts()
        self._probing = Probing()
        self._alone_costs = AloneCosts()
        self._probing_of: dict[str, Probing] = {}
        """By the kind of draft, of rows that are alone in their step."""
        self._of_all: dict[tuple[str, bool], Acceptance] = {}
        """By the kind of draft, and whether a grammar guides the answer."""
        self._of_one: dict[Key, dict[str, Acceptance]] = {}
        self._ended: deque[Ended] = deque()
        self._guessed_in_a_row = 0
        self._vain = self._rest = 0
        self._row_s = _SHORT_S
        """What a plain step takes for each of its rows."""
        self._ran: tuple[int, int, int] | None = None

    def rests(self) -> bool:
        """Whether the next step shall not even be looked at; to be asked once for every step.

        Where guesses are rare and steps are short, looking for them is what costs most.
        """
        if self._rest > 0:
            self._rest -= 1
            return True
        if self._vain < _LOOKS or self._row_s >= _SHORT_S or self._paid is not None:
            return False
        self._vain, self._rest = _LOOKS - _LOOKS_AGAIN, _REST
        self._alone_costs.interrupted()
        return True

    def draft(self, guessing: Guessing) -> list[Draft]:
        """The drafts to verify, one per wish, cut or filled up to what pays."""
        rows = len(guessing.wishes)
        self._paid_ran = False
        self._vain += rows
        try:
            alone = rows == 1 and self._paid is None
            drafts = [self._alone(guessing)] if alone else self._worthwhile(guessing)
        except Exception as error:  # guesses are a luxury: the step runs without
            _log.error("guessing tokens failed: %s", describe_defect(error))
            drafts = [NOTHING] * rows
        if rows == 1:
            guessed, guessing_rows = len(drafts[0].tokens), 1 if drafts[0].tokens else 0
        else:
            guessed = sum(len(draft.tokens) for draft in drafts)
            guessing_rows = sum(bool(draft.tokens) for draft in drafts)
        steady = self._paid is None or not (self._paid_ran and self._paid.caught_up)
        steady = steady and (guessed > 0 or not self._paid_ran)
        guessing_rows = 1 if self._paid_ran else guessing_rows
        self._ran = (rows, guessing_rows, guessed) if guessing.decoding and steady else None
        return drafts

    def observe(self, guessing: Guessing, drafts: Sequence[Draft], held: Sequence[int]) -> None:
        """Learn that `held` tokens of each draft were what was chosen."""
        try:
            self._observe(guessing, drafts, held)
        except Exception as error:  # as in `draft`
            _log.error("learning from guesses failed: %s", describe_defect(error))

    def _observe(self, guessing: Guessing, drafts: Sequence[Draft], held: Sequence[int]) -> None:
        for wish, draft, accepted in zip(guessing.wishes, drafts, held, strict=True):
            if wish is None or not draft.tokens:
                continue
            kind = draft.kind, wish.guide is not None
            of_all = self._of_all.get(kind)
            if of_all is None:
                of_all = self._of_all[kind] = Acceptance(kept=KEPT_OF_ALL)
            book = self._book(wish.key)
            of_one = book.get(draft.kind)
            if of_one is None:
                of_one = book[draft.kind] = Acceptance(kept=KEPT_OF_ONE)
            of_any = book.get(_ANY)
            if of_any is None:
                of_any = book[_ANY] = Acceptance(kept=KEPT_OF_ONE)
            self._vain = max(0, self._vain - _LOOKS_WON * accepted)
            meant = len(draft.tokens) - draft.padding
            of_all.observe(meant, min(meant, accepted))
            of_one.observe(meant, min(meant, accepted))
            of_any.observe(meant, min(meant, accepted))
            for drafter in self._everyone:
                drafter.observe(wish.key, accepted)

    def ended(self, ended: Ended) -> None:
        """A request that ran is gone, maybe while a step runs: looked at before the next one."""
        self._ended.append(ended)

    def timed(self, seconds: float) -> None:
        """Learn how long the last step took, with all that the engine did around it."""
        ran, self._ran = self._ran, None
        if ran is not None and not ran[2]:
            self._row_s += _ROW_WEIGHT * (min(seconds / ran[0], _SHORT_S) - self._row_s)
        if ran is None or ran[0] > 1 or self._paid is not None:
            self._alone_costs.interrupted()
            if ran is not None:
                costs = self._paid_costs if self._paid_ran else self._costs
                costs.observe(*ran, seconds)
        else:
            self._alone_costs.observe(ran[2], seconds)

    def _alone(self, guessing: Guessing) -> Draft:
        """What `_worthwhile` is for several: the draft of the only row of a step, as it pays."""
        gone = self._remember() if self._ended else ()
        wish = guessing.wishes[0]
        if wish is None or wish.key in gone:
            return NOTHING
        draft = self._idea(wish)
        most = min(wish.most, guessing.most)
        if not draft.tokens or most < 1 or self._alone_costs.since_plain >= _PLAIN_EVERY:
            return NOTHING
        acceptance = self._acceptance(wish, draft)
        size, gain = self._alone_costs.best(len(draft.tokens), acceptance, most)
        if gain >= _MARGIN:
            self._probing_of.pop(draft.kind, None)
        elif gain == 0 or not self._probing_of.setdefault(draft.kind, Probing()).refuse():
            return NOTHING
        return draft.sized(size)

    def _idea(self, wish: Wish) -> Draft:
        """The first idea that anybody has, or a longer one that begins like it."""
        best = NOTHING
        for drafter in self._drafters:
            (draft,) = drafter.propose((wish,))
            known = len(best.tokens)
            if len(draft.tokens) > known and draft.tokens[:known] == best.tokens:
                best = draft
        return self._until_eos(best) if best.tokens else NOTHING

    def _worthwhile(self, guessing: Guessing) -> list[Draft]:
        """The drafts that pay most: of the free drafters, or with the paid one's beside them."""
        rows, gone = len(guessing.wishes), self._remember()
        # One that left since the step was planned would only be remembered for ever.
        wishes = tuple(wish if wish and wish.key not in gone else None for wish in guessing.wishes)
        drafts = self._propose(wishes)
        nothing = self._paid is None and not any(draft.tokens for draft in drafts)
        costs = None if nothing or guessing.most < 1 else self._costs.tables(rows, guessing.most)
        if costs is None:
            return [NOTHING] * rows
        lengths, gain = share_out(self._prospects(wishes, drafts), costs, rows)
        if self._paid is not None:
            dear = self._with_paid(replace(guessing, wishes=wishes), drafts, costs[0][0], gain)
            if dear is not None:
                return dear
        if not self._go(self._probing, gain):
            return [NOTHING] * rows
        return [draft.cut(tokens) for draft, tokens in zip(drafts, lengths, strict=True)]

    def _with_paid(
        self, guessing: Guessing, drafts: list[Draft], plain_s: float, free_gain: float
    ) -> list[Draft] | None:
        """With the paid drafter's guesses where the free ones have none; None if it loses."""
        rows, wishes = len(drafts), guessing.wishes
        costs = self._paid_costs.dear_tables(rows, guessing.most, self._costs)
        open_rows = [
            place
            for place, (wish, draft) in enumerate(zip(wishes, drafts, strict=True))
            if wish is not None and wish.most and not draft.tokens
        ]
        if costs is None or not open_rows:
            return None
        hoped = [
            Draft(kind=PAID, tokens=(0,) * wish.most) if place in open_rows and wish else draft
            for place, (wish, draft) in enumerate(zip(wishes, drafts, strict=True))
        ]
        lengths, gain = share_out(self._prospects(wishes, hoped), costs, rows)
        saved_s = plain_s / rows * (1 - 1 / gain) if gain > 0 else 0.0
        if gain <= free_gain or not self._go(self._paid_probing, gain):
            return None
        asked = [
            (place, replace(wish, most=lengths[place]))
            for place in open_rows
            if (wish := wishes[place]) and lengths[place] and self._worth_catching_up(wish, saved_s)
        ]
        return self._ask_paid(asked, drafts, lengths) if asked else None

    def _ask_paid(
        self, asked: list[tuple[int, Wish]], drafts: list[Draft], lengths: Sequence[int]
    ) -> list[Draft]:
        assert self._paid is not None, "it was asked for its costs"
        merged = [draft.cut(tokens) for draft, tokens in zip(drafts, lengths, strict=True)]
        found = self._paid.propose([wish for _, wish in asked])
        for (place, _), draft in zip(asked, found, strict=True):
            merged[place] = self._until_eos(replace(draft, kind=PAID))
        self._paid_ran = True
        return merged

    def _worth_catching_up(self, wish: Wish, saved_s: float) -> bool:
        """Whether what it lacks of the prompt is won back by a usual answer; once begun, yes."""
        assert self._paid is not None, "it was asked for its costs"
        return self._paid.catch_up_s(wish) <= saved_s * min(wish.remaining, _USUAL_ANSWER_TOKENS)

    def _prospects(self, wishes: Sequence[Wish | None], drafts: Sequence[Draft]) -> list[Prospect]:
        return [
            Prospect(tokens=len(draft.tokens), acceptance=self._acceptance(wish, draft))
            for wish, draft in zip(wishes, drafts, strict=True)
        ]

    def _remember(self) -> set[Key]:
        """Tell everyone who has ended since the last step; who that is."""
        gone = set()
        while self._ended:
            ended = self._ended.popleft()
            gone.add(ended.key)
            self._of_one.pop(ended.key, None)
            for drafter in self._everyone:
                drafter.remember(ended)
        return gone

    def _propose(self, wishes: Sequence[Wish | None]) -> list[Draft]:
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

    def _go(self, probing: Probing, gain: float) -> bool:
        if gain < _MARGIN:
            self._guessed_in_a_row = 0
            return gain > 0 and probing.refuse()
        probing.won()
        self._guessed_in_a_row = (self._guessed_in_a_row + 1) % _PLAIN_EVERY
        return self._guessed_in_a_row > 0

    def _acceptance(self, wish: Wish | None, draft: Draft) -> float:
        if wish is None or not draft.tokens:
            return 0.0
        of_all = self._of_all.get((draft.kind, wish.guide is not None))
        prior = draft.likely if of_all is None else of_all.rate(draft.likely)
        book = self._of_one.get(wish.key)
        if book is None:
            return prior
        of_one = book.get(draft.kind)
        rate = prior if of_one is None else of_one.rate(prior)
        # Who was guessed wrong in one way is soon guessed wrong in another.
        return min(rate, book[_ANY].rate(rate))

    def _book(self, key: Key) -> dict[str, Acceptance]:
        book = self._of_one.pop(key, None) or {}
        self._of_one[key] = book  # the latest is the last
        if len(self._of_one) > self._most_requests:
            del self._of_one[next(iter(self._of_one))]
        return book
