"""What a battery gave between two looks at it, by its own word: its watts, or else what is left.

Its watts are taken where the driver tells them. Else what is left is subtracted, from one change of
it to the next: gauges renew it in steps, and a step is of all the time since the one before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from tidegate.edge.energy.sensors.sample import BatteryState

_FOLLOW_S: Final = 10.0
"""In which 63 % of a change of the watts of idling are learnt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Used:
    """Joules that came out of a battery, and in how many seconds."""

    joules: float
    seconds: float


@dataclass(kw_only=True)
class BatteryUse:
    """Follows one battery while nothing comes from outside."""

    idle_w: float | None = None
    """Out of the battery while nothing ran; None until that was seen."""
    _then_s: float | None = None
    _then_j: float = 0.0
    _idled: bool = True

    def restart(self) -> None:
        """What comes out from now on is counted; what idling takes is kept."""
        self._then_s = None

    def see(
        self, battery: BatteryState, *, now_s: float, left_j: float, idling: bool
    ) -> Used | None:
        """A new look.

        Args:
            battery: as it is now.
            now_s: of a monotonic clock.
            left_j: in it.
            idling: whether nothing has run since the look before.

        Returns:
            what came out since the last that was told; None if that is not known yet.
        """
        if self._then_s is None:
            self._then_s, self._then_j, self._idled = now_s, left_j, True
            return None
        seconds = now_s - self._then_s
        self._idled = self._idled and idling
        if seconds <= 0 or (battery.drawn_w is None and left_j == self._then_j):
            return None
        told_w = battery.drawn_w
        joules = self._then_j - left_j if told_w is None else told_w * seconds
        if self._idled:
            self._learn(joules / seconds, seconds)
        self._then_s, self._then_j, self._idled = now_s, left_j, True
        return Used(joules=joules, seconds=seconds)

    def _learn(self, watts: float, seconds: float) -> None:
        old = max(0.0, watts) if self.idle_w is None else self.idle_w
        self.idle_w = old + -math.expm1(-seconds / _FOLLOW_S) * (max(0.0, watts) - old)
