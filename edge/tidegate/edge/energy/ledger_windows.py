"""`Window`: joules drawn between two samples, and who worked in it; `IdleWatts`: what idling takes.

A step is reported when it ends, which may be after samples that fell into it. So the joules of a
window stay open until every step that could lie in it was reported, and are divided then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

_MEMORY_S: Final = 300.0
"""Of the mean of idle watts: long beside the noise of sensors, short beside an hour of the day."""


@dataclass(eq=False, kw_only=True, slots=True)
class Account:
    """One request's."""

    id: str
    measured_j: float = 0.0
    scope: str | None = None
    """That the measured joules are of."""
    model_j: float = 0.0
    radio_j: float = 0.0
    worked: bool = False
    """Some step of it ran on this device."""
    unmeasured: bool = False
    """Some of it was while nothing was measured, or is of another scope."""
    partial: bool = False
    """Its beginning is not known, so that nothing can be told of it."""
    ahead: int = 0
    """Of its steps, those that end after the last sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Some of a step, from a moment to another, and the requests whose it is."""

    begins_s: float
    ends_s: float
    whole_s: float
    """Seconds of the whole step."""
    shares: tuple[tuple[Account, float, float], ...]
    """Account, weight and the cost model's joules, of the whole step."""

    def overlap_s(self, begins_s: float, ends_s: float) -> float:
        """Seconds of it that lie between two moments."""
        return max(0.0, min(self.ends_s, ends_s) - max(self.begins_s, begins_s))


@dataclass(eq=False, kw_only=True, slots=True)
class Window:
    """Measured joules between two moments that are not booked yet."""

    begins_s: float
    ends_s: float
    joules: float
    scope: str
    idle: bool = True
    """Without any step it is a measure of idling: no request ran when it ended, and it is whole."""
    weights: dict[Account, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """That it lasts."""
        return self.ends_s - self.begins_s

    def take(self, part: Part) -> float:
        """Weigh what of a part lies in it; its seconds."""
        seconds = part.overlap_s(self.begins_s, self.ends_s)
        if seconds > 0:
            for account, weight, _ in part.shares:
                before = self.weights.get(account, 0.0)
                self.weights[account] = before + weight * seconds / part.whole_s
        return seconds

    def cut(self, at_s: float) -> Window:
        """What is left after a moment, with no work in it; this one then ends there.

        The power of a window is taken to be the same all through.
        """
        left_j = self.joules * (self.ends_s - at_s) / self.seconds
        left = Window(
            begins_s=at_s, ends_s=self.ends_s, joules=left_j, scope=self.scope, idle=False
        )
        self.joules -= left_j
        self.ends_s = at_s
        return left

    def divided(self, above_j: float) -> Iterator[tuple[Account, float]]:
        """Joules above idling by request."""
        total = sum(self.weights.values())
        for account, weight in self.weights.items():
            yield account, above_j * weight / total


class IdleWatts:
    """What idling was seen to take, by scope: a mean over the time in which no step ran."""

    def __init__(self) -> None:
        self._watts: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def seen(self, scope: str, watts: float, seconds: float) -> None:
        """`seconds` without work, at `watts`."""
        known_s = self._seconds.get(scope, 0.0) + seconds
        weight = max(seconds / known_s, -math.expm1(-seconds / _MEMORY_S))
        before = self._watts.get(scope, watts)
        self._watts[scope] = before + weight * (watts - before)
        self._seconds[scope] = known_s

    def of(self, scope: str) -> float | None:
        """Watts; None where idling was not seen yet."""
        return self._watts.get(scope)
