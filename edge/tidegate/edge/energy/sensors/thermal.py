"""Temperatures of thermal zones, found by type: their numbers change between kernels.

Limits are the profile's; where it gives none, the kernel's own trip points are taken: the lowest
`passive` one as soft, the lowest `hot` or `critical` one as hard.
Source: Documentation/driver-api/thermal/sysfs-api.rst (millidegrees Celsius).
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
KNOWN: Final = ("x86_pkg_temp", "cpu-thermal", "cpu_thermal", "soc-thermal", "tj-thermal")
"""Types of zones that are of the processor, for boards whose profile names none."""
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
        zones, faults = self._zones()
        sensors = self._sensors or [ThermalSensor(zone_type=one) for one in KNOWN if one in zones]
        found: list[Warmth] = []
        for sensor in sensors:
            folders = zones.get(sensor.zone_type, [])
            if not folders:
                faults.append(f"thermal: no zone is of type {sensor.zone_type}")
            for folder in folders:
                try:
                    found.append(_warmth(folder, sensor))
                except SensorError as error:
                    faults.append(f"thermal: {error}")
        return min(found, key=_room_c, default=None), tuple(faults)

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
    celsius = read_number(folder / "temp") / 1000
    if not _POSSIBLE_C[0] <= celsius <= _POSSIBLE_C[1]:
        raise SensorError(f"{folder / 'temp'}: {celsius:.0f} C cannot be")
    soft_c, hard_c = sensor.soft_c, sensor.hard_c
    if soft_c is None and hard_c is None:
        soft_c, hard_c = _trips(folder)
    return Warmth(celsius=celsius, soft_c=soft_c, hard_c=hard_c)


def _trips(folder: Path) -> tuple[float | None, float | None]:
    """The kernel's own soft and hard limit; one that cannot be read is none."""
    soft: list[float] = []
    hard: list[float] = []
    for file in matches(folder, "trip_point_*_type"):
        try:
            kind = read_text_if(file)
            celsius = read_number(folder / file.name.replace("_type", "_temp")) / 1000
        except SensorError:
            continue
        if _TRIP_C[0] <= celsius <= _TRIP_C[1] and kind in ("passive", "hot", "critical"):
            (soft if kind == "passive" else hard).append(celsius)
    soft_c, hard_c = min(soft, default=None), min(hard, default=None)
    if soft_c is not None and hard_c is not None and soft_c >= hard_c:
        soft_c = None
    return soft_c, hard_c
