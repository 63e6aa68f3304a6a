"""`Quarantine`: who of a failed step is to blame, found by halves.

A step fails as a whole, but mostly because of one request in it, or because all of them together
were too much. So its requests start over in two smaller groups, each run without anybody else,
until a request fails alone or all have passed: one culprit among n costs about 2 log2 n steps, and
the other n - 1 lose time instead of their answers. Pure; knows keys only.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from tidegate.engine.scheduler import Key

_MOST_IN_A_ROW: Final = 4
"""Requests that fail alone with no success between: then it is the executor, and all give up."""


class Quarantine:
    """Groups of suspects, tried from the last. Without suspects everybody may run."""

    def __init__(self) -> None:
        self._groups: list[list[Key]] = []
        self._in_a_row = 0

    @property
    def group(self) -> tuple[Key, ...]:
        """Who alone may run now; empty: no quarantine."""
        return tuple(self._groups[-1]) if self._groups else ()

    def failed(self, keys: Collection[Key], *, alone: bool) -> tuple[Key, ...]:
        """A step failed in which these requests ran; who of all suspects is given up.

        Args:
            keys: without those that have left while the step ran.
            alone: the step had one row, so there is no doubt.
        """
        self.leave(keys)
        suspects = sorted(keys)
        if not suspects:
            return ()
        if not alone:
            half = len(suspects) // 2
            self._groups += [part for part in (suspects[half:], suspects[:half]) if part]
            return ()
        self._in_a_row += 1
        if self._in_a_row < _MOST_IN_A_ROW:
            return tuple(suspects)
        given_up = (*suspects, *(key for group in self._groups for key in group))
        self._groups, self._in_a_row = [], 0
        return given_up

    def passed(self, keys: Collection[Key]) -> None:
        """A step succeeded, and these requests now have all they were waiting for."""
        self._in_a_row = 0
        self.leave(keys)

    def leave(self, keys: Collection[Key]) -> None:
        """These requests are no longer suspects, or no longer here."""
        gone = set(keys)
        groups = ([key for key in group if key not in gone] for group in self._groups)
        self._groups = [group for group in groups if group]
