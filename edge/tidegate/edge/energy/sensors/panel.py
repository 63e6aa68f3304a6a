"""`open_panel`: everything that can be read on a board, in one sample that never fails.

Power sources stand in order of preference, those of the profile first; the first that gives joules
is taken. When it fails the next one is, and in the end the estimate, each with a count of its own;
when it comes back it is taken again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from tidegate.edge.energy.cost import CostModel
from tidegate.edge.energy.profile import Profile
from tidegate.edge.energy.sensors.faults import Faults
from tidegate.edge.energy.sensors.power_supply import Batteries
from tidegate.edge.energy.sensors.pressure import stalled_share
from tidegate.edge.energy.sensors.sample import BatteryState, PowerSource, Sample
from tidegate.edge.energy.sensors.slot import Slot, rails_of
from tidegate.edge.energy.sensors.sources import Sources, sources_of
from tidegate.edge.energy.sensors.thermal import ThermalZones
from tidegate.edge.energy.sensors.work import ModelSource, WorkTally
from tidegate.errors import SensorError


def open_panel(
    profile: Profile, *, sysroot: Path, clock: Callable[[], float], costs: CostModel
) -> BoardPanel:
    """The panel of a board: the sensors that its profile names, then what the machine has.

    Args:
        profile: of the board.
        sysroot: where the board's files are.
        clock: monotonic seconds.
        costs: that joules are estimated from where nothing measures them.
    """
    work = WorkTally()
    return BoardPanel(
        sources=sources_of(profile, sysroot=sysroot, clock=clock, work=work),
        model=ModelSource(costs, work, clock),
        work=work,
        zones=ThermalZones(sysroot=sysroot, sensors=profile.sensor.thermal),
        batteries=Batteries(sysroot=sysroot),
        battery_expected=profile.battery.present,
        sysroot=sysroot,
        clock=clock,
    )


class BoardPanel:
    """See `Panel`. Safe to be sampled in one thread while another tells what was worked."""

    def __init__(
        self,
        *,
        sources: Sources,
        model: ModelSource,
        work: WorkTally,
        zones: ThermalZones,
        batteries: Batteries,
        battery_expected: bool,
        sysroot: Path,
        clock: Callable[[], float],
    ) -> None:
        self._slots = [Slot(one, expected=True) for one in sources.named]
        self._slots += [Slot(one, expected=False) for one in sources.found]
        self._partial = sources.partial
        self._model = model
        self._work = work
        self._zones = zones
        self._batteries = batteries
        self._battery_expected = battery_expected
        self._sysroot = sysroot
        self._clock = clock
        self._faults = Faults()
        self._lock = threading.Lock()
        self._counted: tuple[Slot, int] | None = None
        """Whose count the last sample was of, and which of its; None: the estimate's."""
        self._count = 0
        self._base_j = 0.0
        self._last_s = clock()
        self._last_j = 0.0
        self._watts = 0.0
        for slot in self._slots:
            slot.try_read(self._last_s)
            if slot.counts:
                break
        self._model_j = model.energy_j()

    def sample(self) -> Sample:
        """See `Panel.sample`."""
        with self._lock:
            now_s = self._clock()
            faults: list[str] = []
            slot, joules = self._take(now_s, faults)
            source: PowerSource = self._model if slot is None else slot.source
            rails = self._rails(slot, faults)
            warmth, missing = self._zones.read()
            faults += missing
            battery = self._battery(faults)
            return Sample(
                at_s=now_s,
                joules=joules,
                watts=self._watts,
                scope=source.scope,
                kind=source.kind,
                rails=rails,
                celsius=None if warmth is None else warmth.celsius,
                soft_c=None if warmth is None else warmth.soft_c,
                hard_c=None if warmth is None else warmth.hard_c,
                battery=battery,
                stalled_share=self._stalled(faults),
                faults=self._faults.lines(faults),
                count=self._count,
            )

    def worked(self, *, seconds: float, joules: float) -> None:
        """See `Panel.worked`."""
        self._work.add(seconds=seconds, joules=joules)

    def _take(self, now_s: float, faults: list[str]) -> tuple[Slot | None, float]:
        """The first source that gives joules, None for the estimate; and its count's joules."""
        chosen: Slot | None = None
        total_j = 0.0
        for slot in self._slots:
            if chosen is not None:
                slot.rest()
            elif (read_j := slot.try_read(now_s)) is not None:
                chosen, total_j = slot, read_j
            elif slot.fault is not None:
                faults.append(slot.fault)
        before_j, self._model_j = self._model_j, self._model.energy_j()
        counted = None if chosen is None else (chosen, chosen.counts)
        if counted != self._counted:
            self._counted = counted
            self._count += 1
            self._base_j = before_j if chosen is None else chosen.base_j
            self._last_j = 0.0
        joules = (self._model_j if chosen is None else total_j) - self._base_j
        if now_s > self._last_s:
            self._watts = (joules - self._last_j) / (now_s - self._last_s)
            self._last_s, self._last_j = now_s, joules
        return chosen, joules

    def _rails(self, slot: Slot | None, faults: list[str]) -> dict[str, float]:
        rails: dict[str, float] = {}
        readers = [rails_of(one) for one in self._partial]
        if slot is not None:
            readers.append(slot.rails())
        for watts, missing in readers:
            rails |= watts
            faults += missing
        return rails

    def _battery(self, faults: list[str]) -> BatteryState | None:
        try:
            battery = self._batteries.state()
        except SensorError as error:
            faults.append(f"battery: {error}")
            return None
        if battery is None and self._battery_expected:
            faults.append("battery: the profile has one, and none is there")
        return battery

    def _stalled(self, faults: list[str]) -> float | None:
        try:
            return stalled_share(self._sysroot)
        except SensorError as error:
            faults.append(f"pressure: {error}")
            return None
