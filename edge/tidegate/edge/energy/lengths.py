"""How long answers are: predicted from those before, by class of request.

Nobody knows how long an answer will be. Joules go by the mean, deadlines by the ninth decile, and
both by what is left once some of it is there. An exact quantile over the last few hundred answers:
real lengths have several peaks, which no fitted distribution follows.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from typing import Final

_KEPT: Final = 256
"""Answers of each class; quantiles of so many are within about 3 % of ranks."""


class AnswerLengths:
    """Predicts one class of answers.

    Args:
        prior: lengths to start from; each is forgotten as answers come.
    """

    def __init__(self, prior: tuple[int, ...] = (32, 64, 128, 256, 512)) -> None:
        self._line = deque(prior, maxlen=_KEPT)
        self._sorted = sorted(prior)
        self._sum = sum(prior)

    def observe(self, tokens: int) -> None:
        """Learn that an answer had so many."""
        if len(self._line) == _KEPT:
            gone = self._line[0]
            del self._sorted[bisect_right(self._sorted, gone) - 1]
            self._sum -= gone
        self._line.append(tokens)
        self._sum += tokens
        insort(self._sorted, tokens)

    def left(self, quantile: float, given: int = 0, most: int | None = None) -> float:
        """Tokens still to come of an answer that has `given`, at `quantile`; at least one.

        Args:
            quantile: from 0 to 1.
            given: tokens that are there.
            most: that the answer may have in all.
        """
        known = self._sorted
        start = bisect_right(known, given)
        longer = len(known) - start
        if longer:
            place = min(longer - 1, int(quantile * longer))
            total = float(known[start + place])
        else:  # longer than any before it: as much again as quantiles of an exponential have it
            total = given + max(1.0, given * quantile)
        if most is not None:
            total = min(total, most)
        return max(1.0, total - given)

    def mean_left(self, given: int = 0, most: int | None = None) -> float:
        """Tokens still to come on average; at least one. Arguments as in `left`."""
        known = self._sorted
        start = bisect_right(known, given)
        if start == len(known):
            return self.left(0.5, given, most)
        tail = known[start:]
        total = sum(tail) / len(tail) if start else self._sum / len(known)
        if most is not None:
            total = min(total, most)
        return max(1.0, total - given)
