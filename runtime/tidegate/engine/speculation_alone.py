"""How many guessed tokens a step of one row verifies: one of a few sizes, by what each costs.

A step whose shape differs from the one before it takes longer, on OpenVINO a quarter of a
millisecond where a step of a very small model takes half a one: the library works out its shapes
anew. So there are few sizes, a draft in between is filled up or cut, and the seconds of a size are
kept apart by whether the step before had it too. What else the machine does slows all steps alike
and changes faster than what sizes cost beside one another, so it is a factor of its own: otherwise
sizes measured at a busy moment would look dear for long.
"""

from __future__ import annotations

from typing import Final

from tidegate.engine.speculation_policy import Cell

SIZES: Final = (1, 3, 7, 15)
"""Guessed tokens. With the row's own one a step of 2, 4 or 8, which is about where the executors'
costs bend (`STEP_COSTS` in benchmarks/edge/speculation.py), or of 16, the most they give logits
for."""

_MORE: Final = 1.1
"""A larger size must promise so much more: the last tokens of a draft hold less often than the
first, and measurements are noisy."""

_WEIGHT: Final = 1 / 64
"""Of the newest step in what its size costs beside the others."""
_PACE_WEIGHT: Final = 0.25
"""Of the newest step in how slow the machine is now."""
_MOST_SLOWER: Final = 2.0
"""A step that took longer than so many times what was expected was disturbed."""


class AloneCosts:
    """Seconds of a step of one row, by its guessed tokens and the shape of the step before."""

    def __init__(self) -> None:
        self._cells: dict[tuple[int, bool], Cell] = {}
        """Seconds at the pace of the first step."""
        self._pace = 1.0
        """How many times as long steps take now."""
        self._last: int | None = None
        self._plain_s: float | None = None
        self._since_plain = 0

    @property
    def since_plain(self) -> int:
        """Steps with guesses since it was last measured what one without takes."""
        return self._since_plain

    def observe(self, guessed: int, seconds: float) -> None:
        """Book a step that verified so many guessed tokens, one of `SIZES` or none."""
        changed = guessed != self._last
        self._last = guessed
        cell = self._cells.get((guessed, changed))
        if cell is None:
            self._cells[guessed, changed] = Cell(mean_s=seconds / self._pace, weight=_WEIGHT)
        else:
            if cell.known:
                slower = min(seconds / (cell.mean_s * self._pace), _MOST_SLOWER)
                self._pace *= 1 + _PACE_WEIGHT * (slower - 1)
            cell.add(seconds / self._pace)
        if guessed:
            self._since_plain += 1
        elif not changed:
            self._since_plain = 0
        if not guessed:
            self._plain_s = self._seconds(0, changed=False)

    def interrupted(self) -> None:
        """A step of another kind came between: the next one is of another shape."""
        self._last = None

    def best(self, tokens: int, acceptance: float, most: int) -> tuple[int, float]:
        """The size that gives the most tokens a second.

        What was not measured is taken to cost what the next smaller size does: hopeful, so that
        it is tried once and then known.

        Args:
            tokens: of the draft.
            acceptance: the chance of each to hold once those before it did.
            most: tokens that may be verified.

        Returns:
            A size, and how many times as fast as a plain step after plain ones that is: 0 when
            nothing can be taken, or what a plain step takes is not known yet.
        """
        if self._plain_s is None:
            return 0, 0.0
        # From one plain step to the next nothing changes; a guess between them changes it twice.
        plain_again_s = self._seconds(0, changed=True) or self._plain_s
        extra_s = max(0.0, plain_again_s - self._plain_s) if self._last == 0 else 0.0
        size, gain, expected, held, taken, seconds = 0, 0.0, 1.0, 1.0, 0, self._plain_s
        for count in SIZES:
            if count > most:
                break
            while taken < min(count, tokens):
                held *= acceptance
                expected += held
                taken += 1
            seconds = self._seconds(count, changed=count != self._last) or seconds
            found = expected * self._plain_s / (seconds + extra_s)
            if found > gain * _MORE:
                size, gain = count, found
            if count >= tokens:
                break
        return size, gain

    def _seconds(self, guessed: int, *, changed: bool) -> float | None:
        """As measured, else as after the other kind of step; None if neither was. At one pace."""
        for kind in (changed, not changed):
            cell = self._cells.get((guessed, kind))
            if cell is not None and cell.known:
                return cell.mean_s
        return None
