"""Temperatures of thermal zones, found by type: their numbers change between kernels.

Where none of the profile's zones is there, as on AMD's processors, a zone or an hwmon chip that is
known to be of the processor stands in. Limits are the profile's; where it gives none, the kernel's
own trip points are taken: the lowest `passive` one as soft, the lowest `hot` or `critical` one as
hard. Sources: Documentation/driver-api/thermal/sysfs-api.rst (millidegrees Celsius) and
Documentation/hwmon/{k10temp,coretemp}.rst.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tidegate.edge.energy.profile import ThermalSensor
from tidegate.edge.energy.sensors.reading import matches, read_number, read_text, read_text_if
from tidegate.errors import SensorError

GLOB: Final = "/sys/class/thermal/thermal_zone*"
KNOWN: Final = (
    "x86_pkg_temp",
    "cpu-thermal",
    "cpu_thermal",
    "soc-thermal",
    "package-thermal",
    "tj-thermal",
)
"""Types of zones that are of the processor."""
CHIPS_GLOB: Final = "/sys/class/hwmon/hwmon*"
CHIPS: Final = ("k10temp", "coretemp")
"""Names of hwmon chips whose first temperature is the processor's (AMD: Tctl; Intel: package)."""
_NO_ZONE: Final = "thermal: no zone is of type"
_POSSIBLE_C: Final = (-40.0, 150.0)
_TRIP_C: Final = (40.0, 150.0)
"""Of a limit; kernels write 0 or -274 for one that is not set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Warmth:
    """The zone that is nearest to its limit."""

    celsius: float
    soft_c: float | None
    hard_c: float | None


class ThermalZones:
    """Reads the zones of a profile, or those that are known to be of a processor."""

    def __init__(self, *, sysroot: Path, sensors: Sequence[ThermalSensor]) -> None:
        self._sysroot = sysroot
        self._sensors = sensors

    def read(self) -> tuple[Warmth | None, tuple[str, ...]]:
        """The warmest, and what is missing; never raises."""
        zones, unread = self._zones()
        found, faults = self._of(self._sensors, zones)
        if not found:
            known = [ThermalSensor(zone_type=one) for one in KNOWN if one in zones]
            instead, more = self._of(known, zones)
            if not instead:
                instead, others = self._chips()
                more += others
            if instead:
                # They stand in for zones that are not there, so that those are not missed.
                found, faults = instead, [one for one in faults if not one.startswith(_NO_ZONE)]
            faults += more
        return min(found, key=_room_c, default=None), (*unread, *faults)

    def _of(
        self, sensors: Sequence[ThermalSensor], zones: Mapping[str, Sequence[Path]]
    ) -> tuple[list[Warmth], list[str]]:
        found: list[Warmth] = []
        faults: list[str] = []
        for sensor in sensors:
            folders = zones.get(sensor.zone_type, [])
            if not folders:
                faults.append(f"{_NO_ZONE} {sensor.zone_type}")
            for folder in folders:
                try:
                    found.append(_warmth(folder, sensor))
                except SensorError as error:
                    faults.append(f"thermal: {error}")
        return found, faults

    def _chips(self) -> tuple[list[Warmth], list[str]]:
        found: list[Warmth] = []
        faults: list[str] = []
        for folder in matches(self._sysroot, CHIPS_GLOB):
            try:
                if read_text_if(folder / "name") in CHIPS:
                    hard_c = _limit_c(folder / "temp1_crit")
                    celsius = _celsius(folder / "temp1_input")
                    found.append(Warmth(celsius=celsius, soft_c=None, hard_c=hard_c))
            except SensorError as error:
                faults.append(f"thermal: {error}")
        return found, faults

    def _zones(self) -> tuple[Mapping[str, list[Path]], list[str]]:
        zones: dict[str, list[Path]] = {}
        faults: list[str] = []
        for folder in matches(self._sysroot, GLOB):
            try:
                zones.setdefault(read_text(folder / "type"), []).append(folder)
            except SensorError as error:
                faults.append(f"thermal: {error}")
        return zones, faults


def _room_c(warmth: Warmth) -> tuple[float, float]:
    """Kelvin below its limit; zones without one come last, the warmest of them first."""
    limit_c = warmth.hard_c if warmth.hard_c is not None else warmth.soft_c
    return (math.inf if limit_c is None else limit_c - warmth.celsius, -warmth.celsius)


def _warmth(folder: Path, sensor: ThermalSensor) -> Warmth:
    celsius = _celsius(folder / "temp")
    soft_c, hard_c = sensor.soft_c, sensor.hard_c
    if soft_c is None and hard_c is None:
        soft_c, hard_c = _trips(folder)
    return Warmth(celsius=celsius, soft_c=soft_c, hard_c=hard_c)


def _celsius(file: Path) -> float:
    celsius = read_number(file) / 1000
    if not _POSSIBLE_C[0] <= celsius <= _POSSIBLE_C[1]:
        raise SensorError(f"{file}: {celsius:.0f} C cannot be")
    return celsius


def _limit_c(file: Path) -> float | None:
    """A limit that the kernel gives; one that cannot be read or cannot be is none."""
    try:
        celsius = read_number(file) / 1000
    except SensorError:
        return None
    return celsius if _TRIP_C[0] <= celsius <= _TRIP_C[1] else None


def _trips(folder: Path) -> tuple[float | None, float | None]:
    """The kernel's own soft and hard limit; one that cannot be read is none."""
    soft: list[float] = []
    hard: list[float] = []
    for file in matches(folder, "trip_point_*_type"):
        celsius = _limit_c(folder / file.name.replace("_type", "_temp"))
        try:
            kind = read_text(file)
        except SensorError:
            continue
        if celsius is not None and kind in ("passive", "hot", "critical"):
            (soft if kind == "passive" else hard).append(celsius)
    soft_c, hard_c = min(soft, default=None), min(hard, default=None)
    if soft_c is not None and hard_c is not None and soft_c >= hard_c:
        soft_c = None
    return soft_c, hard_c
