"""`Slot`: one power source of a panel, and whether its joules can be taken.

A source is taken from the second good reading in a row on, since joules lie between two of them.
After a failure it is tried again at once, then ever less often, so that a program that hangs does
not hold up every sample.
"""

from __future__ import annotations

from typing import Final

from tidegate.edge.energy.sensors.gauge import LONGEST_GAP_S
from tidegate.edge.energy.sensors.sample import PowerSource
from tidegate.errors import SensorError

_LONGEST_REST_S: Final = 30.0


class Slot:
    """A source and how it did.

    Args:
        source: to be read.
        expected: by the profile; one that is not, and never was there, is no fault.
    """

    def __init__(self, source: PowerSource, *, expected: bool) -> None:
        self.source = source
        self.fault: str | None = None
        """Why its joules cannot be taken now."""
        self.base_j = 0.0
        """Of the reading before the first that was taken: where its count began."""
        self.counts = 0
        """How often it began one."""
        self._expected = expected
        self._seen = False
        self._at_s: float | None = None
        self._failures = 0
        self._again_s = 0.0

    def try_read(self, now_s: float) -> float | None:
        """Joules so far; None where they cannot be taken at this sample. Never raises."""
        if self._failures and now_s < self._again_s:
            return None
        try:
            joules = self.source.energy_j()
        except SensorError as error:
            self._fail(now_s, error)
            return None
        before_s, self._at_s = self._at_s, now_s
        self._seen, self._failures, self.fault = True, 0, None
        if before_s is None or now_s - before_s > LONGEST_GAP_S:
            self.base_j = joules
            self.counts += 1
            self.fault = f"{self.source.name}: can be read, and is counted from now on"
            return None
        return joules

    def rest(self) -> None:
        """It was not tried at this sample: its next reading only begins a count."""
        self._at_s = None

    def rails(self) -> tuple[dict[str, float], tuple[str, ...]]:
        """Watts of its rails besides the total, and what is missing of them; never raises."""
        if self._failures:
            return {}, ()
        return rails_of(self.source)

    def _fail(self, now_s: float, error: SensorError) -> None:
        self._at_s = None
        self._again_s = now_s + min(_LONGEST_REST_S, 2.0**self._failures - 1)
        self._failures = min(self._failures + 1, 10)
        shown = self._expected or self._seen
        self.fault = f"{self.source.name}: {error}" if shown else None


def rails_of(source: PowerSource) -> tuple[dict[str, float], tuple[str, ...]]:
    """Watts of a source's rails besides the total, and what is missing of them; never raises."""
    try:
        watts = source.watts()
    except SensorError as error:
        return {}, (f"{source.name}: {error}",)
    faults = tuple(f"{source.name}: {one}" for one in source.faults)
    return {rail: one for rail, one in watts.items() if rail != "total"}, faults
