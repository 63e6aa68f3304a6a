"""`ModelDrafter`: a smaller model with the same tokenizer guesses, one greedy token after another.

It has an executor and KV books of its own, and keeps up with its requests lazily: what it lacks of
a request's tokens, it computes before it guesses; what it guessed wrong is rewound. All requests
that guess share its steps. It may hold fewer requests than run; those it has no room for wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tidegate.engine.batch import kv_for
from tidegate.engine.drafts import NOTHING, Draft, Ended, Wish
from tidegate.engine.executor import Executor, ExecutorStep, Row, Tokens, Unloadable
from tidegate.engine.kv import Match
from tidegate.engine.scheduler import Key

KIND: Final = "model"
_WEIGHT: Final = 0.25
"""Of the newest measurement."""
_USUAL_GAP: Final = 2
"""Tokens it lacks from step to step: its own last guess, and the token after it."""


@dataclass(slots=True)
class _Trail:
    """What the KV of one request holds: its first `computed` tokens, then what was guessed."""

    computed: int
    fed: list[int] = field(default_factory=list)
    """Guesses whose KV was computed too."""


class ModelDrafter:
    """See `tidegate.engine.speculation.PaidDrafter`. Used by the thread of the steps alone."""

    def __init__(
        self, executor: Executor, *, vocab: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Guess with `executor`, which belongs to whoever made it.

        Args:
            executor: the smaller model; its KV decides for how many requests it guesses.
            vocab: tokens of the model that verifies; a guess beyond them ends a draft.
            clock: monotonic seconds.
        """
        self._executor = executor
        self._kv = kv_for(executor.kv, reuse=True)
        self._vocab = min(vocab, executor.limits.vocab)
        self._clock = clock
        self._trails: dict[Key, _Trail] = {}
        self._token_s: float | None = None
        self.caught_up = 0
        """Tokens that the last `propose` computed beyond the usual ones."""

    def catch_up_s(self, wish: Wish) -> float:
        """About how long it would take to compute what it lacks of a request."""
        return self._gap(wish) * (self._token_s or 0.0)

    def propose(self, wishes: Sequence[Wish]) -> list[Draft]:
        """See `Drafter.propose`.

        Raises:
            ExecutionError: a step of the smaller model failed; all its KV is forgotten.
        """
        drafts = [NOTHING] * len(wishes)
        able = [place for place, wish in enumerate(wishes) if wish.most > 0 and self._hold(wish)]
        able = able[: min(self._executor.limits.step_rows, self._executor.limits.step_logits)]
        chosen = [wishes[place] for place in able]
        try:
            found = self._guess(chosen)
        except Exception:
            for key in list(self._trails):
                self._drop(key, forget=True)
            raise
        for place, tokens in zip(able, found, strict=True):
            if tokens:
                drafts[place] = Draft(kind=KIND, tokens=tuple(tokens))
        return drafts

    def observe(self, key: Key, accepted: int) -> None:
        """Nothing to learn: the next wish shows which guesses held."""

    def remember(self, ended: Ended) -> None:
        """See `Drafter.remember`: its room is free."""
        self._drop(ended.key)

    def unload(self) -> None:
        """See `PaidDrafter.unload`; what is kept of earlier requests is lost with the KV."""
        if isinstance(self._executor, Unloadable):
            self._trails.clear()
            self._kv = kv_for(self._executor.kv, reuse=True)
            self._executor.unload()

    def _guess(self, wishes: Sequence[Wish]) -> list[list[int]]:
        began_s, gap = self._clock(), sum(self._gap(wish) for wish in wishes)
        ready = self._catch_up(wishes)
        self.caught_up = gap
        if gap:
            spent_s = (self._clock() - began_s) / gap
            old = spent_s if self._token_s is None else self._token_s
            self._token_s = old + _WEIGHT * (spent_s - old)
        found: list[list[int]] = [[] for _ in wishes]
        going = {place: token for place, token in ready.items() if token is not None}
        while going:
            for place, token in going.items():
                found[place].append(token)
            going = {
                place: token
                for place, token in going.items()
                if token < self._vocab and len(found[place]) < wishes[place].most
            }
            rows = [self._guessed_row(wishes[place], token) for place, token in going.items()]
            going = dict(zip(going, self._run(rows), strict=True)) if rows else {}
        return [[token for token in tokens if token < self._vocab] for tokens in found]

    def _catch_up(self, wishes: Sequence[Wish]) -> dict[int, int | None]:
        """The first guess for each wish, None for one that still lacks tokens after this step."""
        rows, places = [], []
        left = self._executor.limits.step_tokens
        for place, wish in enumerate(wishes):
            trail = self._trails[wish.key]
            end = min(len(wish.tokens), trail.computed + left)
            if end == trail.computed:
                continue
            left -= end - trail.computed
            whole = end == len(wish.tokens)
            rows.append(
                self._row(wish.key, wish.tokens[trail.computed : end], trail.computed, whole)
            )
            places.append((place, whole))
            trail.computed, trail.fed = end, []
            if wish.shared:
                self._kv.commit(wish.key, wish.tokens[:end])
        logits = iter(self._run(rows) if rows else ())
        return {place: next(logits) if whole else None for place, whole in places}

    def _guessed_row(self, wish: Wish, token: int) -> Row:
        trail = self._trails[wish.key]
        past = trail.computed + len(trail.fed)
        trail.fed.append(token)
        return self._row(wish.key, np.array([token], np.int64), past, True)

    def _row(self, key: Key, tokens: Tokens, past: int, whole: bool) -> Row:
        place = self._kv.place(key)
        return Row(
            tokens=tokens, past=past, blocks=place.blocks, slot=place.slot, logits=int(whole)
        )

    def _run(self, rows: Sequence[Row]) -> list[int]:
        step = ExecutorStep(rows=tuple(rows), copies=self._kv.take_copies())
        return [int(token) for token in self._executor.execute(step).logits.argmax(axis=1)]

    def _gap(self, wish: Wish) -> int:
        """Tokens it lacks beyond those it always does."""
        trail = self._trails.get(wish.key)
        known = 0 if trail is None else trail.computed + len(trail.fed)
        return max(0, len(wish.tokens) - known - _USUAL_GAP)

    def _hold(self, wish: Wish) -> bool:
        """Bring a request's books up to date; False when there is no room for it."""
        end = len(wish.tokens) + wish.most
        if end > self._executor.limits.context_tokens:
            self._drop(wish.key)
            return False
        trail = self._trails.get(wish.key)
        if trail is None:
            return self._admit(wish, end)
        later = wish.tokens[trail.computed :].tolist()
        held = 0
        while held < min(len(later) - 1, len(trail.fed)) and later[held] == trail.fed[held]:
            held += 1
        trail.computed += held
        trail.fed = []
        self._kv.trim(wish.key, trail.computed)
        return self._make_room(wish.key, end)

    def _admit(self, wish: Wish, end: int) -> bool:
        match = self._kv.match(wish.key, wish.tokens) if wish.shared else Match()
        if self._units(end) - match.units + match.drawn > self._kv.free:
            return False
        computed = self._kv.admit(wish.key, wish.tokens, reuse=wish.shared)
        self._trails[wish.key] = _Trail(computed=computed)
        return self._make_room(wish.key, end)

    def _make_room(self, key: Key, tokens: int) -> bool:
        if self._units(tokens) - self._kv.held(key) > self._kv.free:
            return False
        self._kv.grow(key, tokens)
        return True

    def _units(self, tokens: int) -> int:
        return -(-tokens // self._kv.unit_tokens)

    def _drop(self, key: Key, *, forget: bool = False) -> None:
        self._trails.pop(key, None)
        self._kv.release(key, forget=forget)
