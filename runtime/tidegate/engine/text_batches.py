"""Which texts go through an encoder together. Pure: times and lengths in, batches out.

Calls wait in a `TextLine`, and their texts, not they, are what a batch is made of: a call with
thousands of texts shares batches with calls that came later. A text's turn is the number of
batches begun when its call came, and one more for each half batch of its own call before it. The
first in turn is in the next batch, so nothing waits for ever; texts of about its length fill it up,
those of the same turn before later ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NewType

from tidegate.errors import CapacityError, ConfigError, RequestError

CallId = NewType("CallId", int)

WINDOW_BATCHES: Final = 8
"""So many batches of texts, first in turn, are looked at for alike lengths."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLimits:
    """Of one batch, and of the line.

    Raises:
        ConfigError: a value is out of range.
    """

    rows: int = 32
    """Texts of a batch at most."""
    tokens: int = 2048
    """The longest of a batch times its texts, at most; a text alone may be longer."""
    wait_s: float = 0.0
    """How long the first in line waits for others while nothing runs; a full batch does not."""
    padding_tokens: int = 16
    """One text more may add so many tokens of padding at most; with more it is run later. A run of
    all-MiniLM costs what 9 to 20 tokens do before its first one (benchmarks/cloud/encoders.py)."""
    most_waiting: int = 4096
    """Texts in line."""

    def __post_init__(self) -> None:
        for name in ("rows", "tokens", "most_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "at least 1")
        if self.padding_tokens < 0:
            raise ConfigError("padding_tokens", self.padding_tokens, "at least 0")
        if not 0 <= self.wait_s <= 1:
            raise ConfigError("wait_s", self.wait_s, "from 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitingText:
    """One text in line."""

    call: CallId
    index: int
    """Its place among the texts of its call."""
    length: int
    """Tokens."""
    turn: int
    arrived_s: float
    deadline_s: float
    """When its caller no longer wants it; infinite without a deadline."""
    number: int
    """Grows with every text that came."""


class TextLine:
    """Texts that wait. Decides; runs nothing and reads no clock."""

    def __init__(self, limits: BatchLimits) -> None:
        """An empty line."""
        self.limits = limits
        self._texts: list[WaitingText] = []
        self._begun = self._numbers = 0

    def __len__(self) -> int:
        """Texts that wait."""
        return len(self._texts)

    def check_room(self, texts: int) -> None:
        """Raise `CapacityError` unless so many texts more may wait."""
        waiting, most = texts + len(self._texts), self.limits.most_waiting
        if waiting > most:
            raise CapacityError(f"{waiting} texts would be waiting: at most {most} may")

    def add(
        self,
        call: CallId,
        lengths: Sequence[int],
        *,
        now_s: float,
        deadline_s: float | None = None,
    ) -> None:
        """Put a call's texts in line.

        Args:
            call: not in line yet.
            lengths: tokens of each text.
            now_s: on the caller's clock, which all times of one line are on.
            deadline_s: after which nobody wants them; such a call does not wait for others.

        Raises:
            CapacityError: the line is full.
        """
        self.check_room(len(lengths))
        share_rows, share_tokens = max(1, self.limits.rows // 2), max(1, self.limits.tokens // 2)
        before_tokens = 0
        for index, length in enumerate(lengths):
            behind = max(index // share_rows, before_tokens // share_tokens)
            text = WaitingText(
                call=call,
                index=index,
                length=length,
                turn=self._begun + behind,
                arrived_s=now_s,
                deadline_s=math.inf if deadline_s is None else deadline_s,
                number=self._numbers,
            )
            self._texts.append(text)
            self._numbers += 1
            before_tokens += length
        self._texts.sort(key=_rank)

    def leave(self, call: CallId) -> None:
        """Take out what waits of a call, if anything does."""
        self._texts = [text for text in self._texts if text.call != call]

    def due_s(self) -> float | None:
        """When the next batch should begin at the latest; None while nobody waits."""
        if not self._texts:
            return None
        limits = self.limits
        many = len(self._texts) >= limits.rows
        if many or sum(text.length for text in self._texts) >= limits.tokens:
            return -math.inf
        waits = (0.0 if text.deadline_s < math.inf else limits.wait_s for text in self._texts)
        return min(text.arrived_s + wait_s for text, wait_s in zip(self._texts, waits, strict=True))

    def take(self) -> list[WaitingText]:
        """Take the next batch out of the line, the longest text first; empty if nobody waits."""
        if not self._texts:
            return []
        self._begun += 1
        window = self._texts[: WINDOW_BATCHES * self.limits.rows]
        batch = alike(window, self.limits)
        taken = {text.number for text in batch}
        self._texts = [text for text in self._texts if text.number not in taken]
        return batch


def _rank(text: WaitingText) -> tuple[int, float, int]:
    return text.turn, text.deadline_s, text.number


def alike(waiting: Sequence[WaitingText], limits: BatchLimits) -> list[WaitingText]:
    """The first of `waiting` and those that go with it at little padding, the longest first.

    Those of its turn come before all others, since they are all but as urgent.
    """
    chosen = [waiting[0]]
    turn = waiting[0].turn
    _fill(chosen, [text for text in waiting[1:] if text.turn == turn], limits)
    _fill(chosen, [text for text in waiting[1:] if text.turn != turn], limits)
    return sorted(chosen, key=lambda text: (-text.length, text.number))


def _fill(chosen: list[WaitingText], others: Sequence[WaitingText], limits: BatchLimits) -> None:
    """Add what adds the least padding, shorter or longer, while it is worth it."""
    longest = max(text.length for text in chosen)
    # The last of each is next: the one whose length is nearest, and of those the earliest.
    shorter = [text for text in others if text.length <= longest]
    shorter.sort(key=lambda text: (text.length, -text.number))
    longer = [text for text in others if text.length > longest]
    longer.sort(key=lambda text: (-text.length, -text.number))
    while len(chosen) < limits.rows:
        rows, below, above = len(chosen), math.inf, math.inf
        if shorter and (rows + 1) * longest <= limits.tokens:
            below = longest - shorter[-1].length
        if longer and (rows + 1) * longer[-1].length <= limits.tokens:
            above = rows * (longer[-1].length - longest)
        if min(below, above) > limits.padding_tokens:
            return
        chosen.append(shorter.pop() if below <= above else longer.pop())
        longest = max(longest, chosen[-1].length)


def batches(lengths: Sequence[int], rows: int, tokens: int) -> list[list[int]]:
    """Which of the texts of one job, all known, run together, by number, the longest first.

    Args:
        lengths: tokens of every text.
        rows: texts of a batch at most.
        tokens: the longest of a batch times its texts, at most; a text alone may be longer.
    """
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        last = found[-1] if found else []
        # The first is the longest, to which the others are padded.
        if last and len(last) < rows and (len(last) + 1) * lengths[last[0]] <= tokens:
            last.append(number)
        else:
            found.append([number])
    return found


def check_texts(texts: Sequence[Sequence[int]], *, context_tokens: int, vocab: int) -> None:
    """Whether an encoder can run each text.

    Raises:
        RequestError: one is empty, too long or has an unknown token; names it.
    """
    for number, text in enumerate(texts):
        if not 1 <= len(text) <= context_tokens:
            allowed = f"must be from 1 to {context_tokens}"
            raise RequestError(f"input[{number}]", f"{len(text)} tokens: {allowed}", status=413)
        if min(text) < 0 or max(text) >= vocab:
            problem = f"token ids must be between 0 and {vocab - 1}"
            raise RequestError(f"input[{number}]", problem)
