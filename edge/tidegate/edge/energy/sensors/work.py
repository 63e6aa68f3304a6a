"""`WorkTally`: what was worked so far; `ModelSource`: joules from it where nothing measures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from tidegate.edge.energy.cost import CostModel
from tidegate.edge.energy.sensors.sample import Kind


class WorkTally:
    """Counted on the event loop, read in the thread that samples."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._joules = 0.0

    def add(self, *, seconds: float, joules: float) -> None:
        """Seconds of steps, and joules above idling as costs say."""
        with self._lock:
            self._seconds += max(0.0, seconds)
            self._joules += max(0.0, joules)

    @property
    def seconds(self) -> float:
        """In which steps ran, since the tally was made."""
        return self._seconds

    @property
    def joules(self) -> float:
        """That they took above idling, by the cost model."""
        return self._joules


class ModelSource:
    """Estimated joules: the idlest mode's watts at all times, and above them what was worked."""

    name = "model"
    kind: Kind = "estimated"

    def __init__(self, costs: CostModel, work: WorkTally, clock: Callable[[], float]) -> None:
        self.scope = costs.scope
        self.faults: tuple[str, ...] = ()
        self._idle_w = costs.idle_w
        self._work = work
        self._clock = clock
        self._opened_s = clock()
        self._last_s = self._opened_s
        self._last_j = 0.0
        self._watts = costs.idle_w

    def energy_j(self) -> float:
        """See `PowerSource.energy_j`; never raises."""
        now_s = self._clock()
        joules = self._idle_w * (now_s - self._opened_s) + self._work.joules
        if now_s > self._last_s:
            self._watts = (joules - self._last_j) / (now_s - self._last_s)
            self._last_s, self._last_j = now_s, joules
        return joules

    def watts(self) -> Mapping[str, float]:
        """See `PowerSource.watts`; never raises."""
        return {"total": self._watts}
