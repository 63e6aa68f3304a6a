"""Answers kept for questions that mean the same, by the embedding of the last message.

Two calls may share an answer when all else in them is identical, their last messages name the same
numbers, and the cosine of those messages' embeddings reaches a threshold. An embedding hardly tells
"on" from "off", so this is for questions that are looked up and not for commands that act: it is
off unless a threshold is set. In memory only, bounded in bytes and age; no message is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from tidegate.edge.answer_cache import CachedAnswer
from tidegate.engine.events import FinishReason, Usage
from tidegate.errors import ConfigError
from tidegate.model.packed import Array

_NUMBERS: Final = re.compile(r"\d+(?:[.,:]\d+)*")
_ENTRY_BYTES: Final = 600
"""About what an entry costs beside its vector and text (sys.getsizeof on CPython 3.11)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Question:
    """What a call asks: its last message as a vector, and all else that shapes the answer."""

    scope: bytes
    """A digest of everything but the last message."""
    numbers: tuple[str, ...] = field(repr=False)
    """The numbers in the last message, in order: equal questions name equal ones."""
    vector: Array = field(repr=False)
    """Of length 1, [D]."""


def question(scope: bytes, message: str, embedding: Array) -> Question | None:
    """The question behind a message; None if its embedding has no direction."""
    length = float(np.linalg.norm(embedding))
    if not np.isfinite(length) or length == 0:
        return None
    vector = (embedding / length).astype(np.float32)
    return Question(scope=scope, numbers=tuple(_NUMBERS.findall(message)), vector=vector)


class SemanticCache:
    """Answers by meaning, the oldest of which make way."""

    def __init__(
        self,
        *,
        similarity: float,
        budget_bytes: int,
        ttl_s: float,
        clock: Callable[[], float],
    ) -> None:
        """Make an empty cache.

        Args:
            similarity: the least cosine at which two messages mean the same, above 0 to 1.
            budget_bytes: for vectors and answers.
            ttl_s: how long an answer is given out.
            clock: seconds.

        Raises:
            ConfigError: `similarity` is out of range.
        """
        if not 0 < similarity <= 1:
            raise ConfigError("semantic_cache", similarity, "above 0, at most 1")
        self.similarity = similarity
        self._budget_bytes, self._ttl_s, self._clock = budget_bytes, ttl_s, clock
        self._entries: list[tuple[Question, CachedAnswer]] = []
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """What the entries take, never above the budget."""
        return self._bytes

    def get(self, asked: Question) -> tuple[CachedAnswer, float] | None:
        """The freshest answer to the most similar question, and the cosine of the two."""
        self._drop_stale()
        alike = [
            (float(known.vector @ asked.vector), place)
            for place, (known, _) in enumerate(self._entries)
            if (known.scope, known.numbers) == (asked.scope, asked.numbers)
            and len(known.vector) == len(asked.vector)
        ]
        cosine, place = max(alike, default=(-1.0, -1))
        # Rounding may leave two equal messages a little short of 1.
        if cosine < self.similarity - 1e-6:
            return None
        return self._entries[place][1], min(cosine, 1.0)

    def put(self, asked: Question, text: str, reason: FinishReason, usage: Usage) -> None:
        """Keep an answer; the oldest go when there is no room."""
        answer = CachedAnswer(text=text, reason=reason, usage=usage, made_s=self._clock())
        size = _nbytes(asked, answer)
        if size > self._budget_bytes:
            return
        while self._bytes + size > self._budget_bytes:
            self._drop_first()
        self._entries.append((asked, answer))
        self._bytes += size

    def _drop_stale(self) -> None:
        oldest_s = self._clock() - self._ttl_s
        while self._entries and self._entries[0][1].made_s < oldest_s:
            self._drop_first()

    def _drop_first(self) -> None:
        self._bytes -= _nbytes(*self._entries.pop(0))


def _nbytes(asked: Question, answer: CachedAnswer) -> int:
    return _ENTRY_BYTES + asked.vector.nbytes + len(answer.text.encode())
