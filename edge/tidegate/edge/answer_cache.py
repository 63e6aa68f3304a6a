"""Answers kept for identical requests: exact, bounded in bytes and age, in memory only.

Only answers that would come out the same again are kept: greedy ones, and sampled ones with a
seed. The key is a digest of the prompt's tokens and of everything that shapes the answer, so the
cache holds no prompt text.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from tidegate.engine.events import FinishReason, Usage
from tidegate.engine.request import Constraint, SamplingParams

_ENTRY_BYTES = 400
"""About what an entry costs beside its text (measured with sys.getsizeof on CPython 3.11)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedAnswer:
    """A complete answer and when it was made, in seconds on the cache's clock."""

    text: str = field(repr=False)
    reason: FinishReason
    usage: Usage
    made_s: float


def answer_key(
    model_id: str,
    prompt: tuple[int, ...],
    sampling: SamplingParams,
    constraint: Constraint | None = None,
) -> bytes | None:
    """The key of a request, or None when asking twice may rightly give two answers.

    Neither have requests that want likelihoods a key: what is kept of an answer is its text.
    """
    if sampling.temperature > 0 and sampling.seed is None:
        return None
    if sampling.logprobs is not None:
        return None  # only texts are kept
    form = None if constraint is None else (constraint.kind, constraint.source, constraint.begun)
    shape = repr((model_id, sorted(asdict(sampling).items()), form, prompt))
    return hashlib.sha256(shape.encode()).digest()


class AnswerCache:
    """Least recently used answers within `budget_bytes`, each for at most `ttl_s` seconds."""

    def __init__(self, *, budget_bytes: int, ttl_s: float, clock: Callable[[], float]) -> None:
        """Make an empty cache; a budget of 0 keeps nothing."""
        self._budget_bytes, self._ttl_s, self._clock = budget_bytes, ttl_s, clock
        self._entries: OrderedDict[bytes, CachedAnswer] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """What the entries take, never above the budget."""
        return self._bytes

    def get(self, key: bytes) -> CachedAnswer | None:
        """The answer of an identical request, if it is still fresh."""
        answer = self._entries.get(key)
        if answer is None:
            return None
        if self._clock() - answer.made_s > self._ttl_s:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return answer

    def peek(self, key: bytes) -> CachedAnswer | None:
        """What `get` would give; nothing is counted as used or let go."""
        answer = self._entries.get(key)
        stale = answer is not None and self._clock() - answer.made_s > self._ttl_s
        return None if stale else answer

    def put(self, key: bytes, text: str, reason: FinishReason, usage: Usage) -> None:
        """Keep an answer, letting the least recently used ones go."""
        if key in self._entries:
            self._drop(key)
        answer = CachedAnswer(text=text, reason=reason, usage=usage, made_s=self._clock())
        if _nbytes(answer) > self._budget_bytes:
            return
        self._entries[key] = answer
        self._bytes += _nbytes(answer)
        while self._bytes > self._budget_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: bytes) -> None:
        self._bytes -= _nbytes(self._entries.pop(key))


def _nbytes(answer: CachedAnswer) -> int:
    return _ENTRY_BYTES + len(answer.text.encode())
