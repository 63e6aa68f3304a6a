"""`GaugeSource`: watts that are read now and then, summed to joules by trapezoids.

A gauge gives the watts of its rails; what cannot be true is refused here, for all back ends alike:
less than nothing, more than the board can draw, or the same numbers for long while the board works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from tidegate.edge.energy.sensors.sample import Kind
from tidegate.edge.energy.sensors.work import WorkTally
from tidegate.errors import SensorError

LONGEST_GAP_S: Final = 60.0
"""Between two readings that belong to one count; the daemon reads at least every few seconds."""
_OFFSET_W: Final = 0.1
"""Below zero by which an idle rail may be read: a step of an INA3221 over 5 mOhm is 8 mA."""
_STUCK_READINGS: Final = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Gauged:
    """One reading."""

    rails: Mapping[str, float]
    """Watts by what the profile calls the rail."""
    raw: tuple[int | str, ...]
    """As it stood in the files, to see whether it changes at all."""
    faults: tuple[str, ...] = field(default=())
    """Of rails besides `total` that are missing."""


class Gauge(Protocol):
    """One back end that reads watts."""

    name: str

    def read(self) -> Gauged:
        """Look at the rails.

        Raises:
            SensorError: they, or the one that is the total, cannot be read.
        """


class GaugeSource:
    """A power source over a gauge.

    Args:
        gauge: the back end.
        scope: what its rail `total` covers; without that rail it has watts and no joules.
        limit_w: above which a reading cannot be true.
        work: what was worked, to see whether a reading may stand still.
        clock: monotonic seconds.
        stuck_s: of work during which a good gauge changes its reading.
    """

    kind: Kind = "measured"

    def __init__(
        self,
        gauge: Gauge,
        *,
        scope: str,
        limit_w: float,
        work: WorkTally,
        clock: Callable[[], float],
        stuck_s: float = 30.0,
    ) -> None:
        self.name = gauge.name
        self.scope = scope
        self.faults: tuple[str, ...] = ()
        self._gauge = gauge
        self._limit_w = limit_w
        self._work = work
        self._clock = clock
        self._stuck_s = stuck_s
        self._at_s: float | None = None
        self._total_w = 0.0
        self._joules = 0.0
        self._rails: Mapping[str, float] = {}
        self._fresh = False
        self._raw: tuple[int | str, ...] = ()
        self._same = 0
        self._worked_s = 0.0

    def energy_j(self) -> float:
        """See `PowerSource.energy_j`; the first call after a failure begins anew."""
        try:
            now_s, rails = self._clock(), self._look()
            if "total" not in rails:
                raise SensorError("none of its rails covers the whole")
        except SensorError:
            self._at_s = None
            raise
        before_s, self._at_s = self._at_s, now_s
        before_w, self._total_w = self._total_w, rails["total"]
        if before_s is not None and now_s - before_s <= LONGEST_GAP_S:
            self._joules += (before_w + self._total_w) / 2 * (now_s - before_s)
        self._fresh = True
        return self._joules

    def watts(self) -> Mapping[str, float]:
        """See `PowerSource.watts`: of this moment, which is the reading of an `energy_j` before."""
        rails = self._rails if self._fresh else self._look()
        self._fresh = False
        return rails

    def _look(self) -> Mapping[str, float]:
        self._rails, self._fresh, self.faults = {}, False, ()
        gauged = self._gauge.read()
        self._check_moving(gauged.raw)
        rails: dict[str, float] = {}
        faults = list(gauged.faults)
        for rail, watts in gauged.rails.items():
            if -_OFFSET_W <= watts <= self._limit_w:
                rails[rail] = max(0.0, watts)
                continue
            told = f"{rail} = {watts:.3g} W: must be from 0 to {self._limit_w:.0f} W"
            if rail == "total":
                raise SensorError(told)
            faults.append(told)
        self._rails, self.faults = rails, tuple(faults)
        return rails

    def _check_moving(self, raw: tuple[int | str, ...]) -> None:
        if raw != self._raw:
            self._raw, self._same, self._worked_s = raw, 0, self._work.seconds
            return
        self._same += 1
        worked_s = self._work.seconds - self._worked_s
        if self._same >= _STUCK_READINGS and worked_s >= self._stuck_s:
            raise SensorError("the reading stands still while the board works")
