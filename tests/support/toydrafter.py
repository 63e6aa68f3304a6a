"""`ForetellingDrafter`: knows the answers and spoils its guesses as it is told to, for tests."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from tidegate.engine.drafts import NOTHING, Draft, Ended, Wish


class ForetellingDrafter:
    """Guesses what comes next from whole texts that it was given, now and then a wrong token."""

    def __init__(
        self,
        texts: Mapping[tuple[int, ...], Sequence[int]],
        *,
        right: float = 0.7,
        seed: int = 0,
        kind: str = "foretold",
    ) -> None:
        """Guess from `texts`, answers by prompt; every token is right with that probability."""
        self.proposed = self.accepted = 0
        self._texts = [(*prompt, *answer) for prompt, answer in texts.items()]
        self._text_of: dict[int, tuple[int, ...]] = {}
        self._right = right
        self._chance = random.Random(seed)
        self._kind = kind

    def propose(self, wishes: Sequence[Wish]) -> list[Draft]:
        return [self._propose(wish) for wish in wishes]

    def observe(self, key: int, accepted: int) -> None:
        self.accepted += accepted

    def remember(self, ended: Ended) -> None:
        self._text_of.pop(ended.key, None)

    def _propose(self, wish: Wish) -> Draft:
        so_far = tuple(wish.tokens.tolist())
        text = self._text_of.get(wish.key)
        if text is None:
            begins = (text for text in self._texts if text[: len(so_far)] == so_far)
            text = self._text_of[wish.key] = next(begins, ())
        if text[: len(so_far)] != so_far:
            return NOTHING
        guess = [self._spoiled(token) for token in text[len(so_far) :][: wish.most]]
        self.proposed += len(guess)
        return Draft(kind=self._kind, tokens=tuple(guess)) if guess else NOTHING

    def _spoiled(self, token: int) -> int:
        return token if self._chance.random() < self._right else (token + 1) % 290
