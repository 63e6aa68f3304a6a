"""`sources_of`: the power sources of a board, from its profile and from what the machine has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tidegate.edge.energy.profile import PowerSensor, Profile
from tidegate.edge.energy.sensors import hwmon, ina3221, power_supply, rapl
from tidegate.edge.energy.sensors.gauge import Gauge, GaugeSource
from tidegate.edge.energy.sensors.rpi_pmic import RpiPmic
from tidegate.edge.energy.sensors.sample import PowerSource
from tidegate.edge.energy.sensors.work import WorkTally

_LIMIT_FACTOR: Final = 10.0
"""Times the greatest watts that the profile knows of its board, at which a reading is nonsense."""
_LIMIT_W: Final = 1000.0
"""For boards of which no watts are known."""
_BATTERY_STUCK_S: Final = 180.0
"""Fuel gauges renew their readings every few seconds to a minute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What can be read, in order of preference."""

    named: tuple[PowerSource, ...]
    """By the profile."""
    found: tuple[PowerSource, ...]
    """That the machine may have besides."""
    partial: tuple[PowerSource, ...]
    """Named by the profile with rails of which none covers the whole: watts and no joules."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Maker:
    sysroot: Path
    clock: Callable[[], float]
    work: WorkTally
    limit_w: float

    def gauge(self, gauge: Gauge, scope: str, stuck_s: float = 30.0) -> PowerSource:
        return GaugeSource(
            gauge,
            scope=scope,
            limit_w=self.limit_w,
            work=self.work,
            clock=self.clock,
            stuck_s=stuck_s,
        )

    def rapl(self, pattern: str = rapl.GLOB, scope: str = "package") -> PowerSource:
        return rapl.RaplSource(
            sysroot=self.sysroot,
            limit_w=self.limit_w,
            clock=self.clock,
            pattern=pattern,
            scope=scope,
        )

    def named(self, sensor: PowerSensor) -> PowerSource:
        """The source that a profile describes; the estimate is none of them."""
        sysroot, rails = self.sysroot, sensor.rails
        scope = sensor.scope or f"rail:{rails.get('total', '')}"
        match sensor.backend:
            case "rapl":
                return self.rapl(sensor.glob or rapl.GLOB, sensor.scope or "package")
            case "ina3221":
                pattern = sensor.glob or ina3221.GLOB
                return self.gauge(
                    ina3221.Ina3221(sysroot=sysroot, pattern=pattern, rails=rails), scope
                )
            case "rpi_pmic":
                return self.gauge(RpiPmic(sysroot=sysroot), scope)
            case "power_supply":
                pattern = sensor.glob or power_supply.GLOB
                batteries = power_supply.Batteries(sysroot=sysroot, pattern=pattern)
                return self.gauge(batteries, sensor.scope or "board_dc", _BATTERY_STUCK_S)
            case "hwmon":
                pattern = sensor.glob or hwmon.GLOB
                return self.gauge(
                    hwmon.HwmonPower(sysroot=sysroot, pattern=pattern, rails=rails), scope
                )
            case "model":
                raise AssertionError("the estimate is no sensor")

    def found(self, backends: set[str]) -> list[PowerSource]:
        """What is looked for on every machine, unless the profile names its back end."""
        sources: list[PowerSource] = []
        if "ina3221" not in backends:
            sources += self._whole_rails()
        if "hwmon" not in backends:
            meter = hwmon.HwmonPower(sysroot=self.sysroot, rails={"total": hwmon.METER})
            sources.append(self.gauge(meter, "platform"))
        if "rapl" not in backends:
            sources.append(self.rapl())
        if "power_supply" not in backends:
            batteries = power_supply.Batteries(sysroot=self.sysroot)
            sources.append(self.gauge(batteries, "board_dc", _BATTERY_STUCK_S))
        return sources

    def _whole_rails(self) -> list[PowerSource]:
        """An INA3221 rail whose label says that it covers the whole."""
        return [
            self.gauge(ina3221.Ina3221(sysroot=self.sysroot, rails={"total": label}), scope)
            for label, scope in ina3221.WHOLE.items()
        ]


def sources_of(
    profile: Profile, *, sysroot: Path, clock: Callable[[], float], work: WorkTally
) -> Sources:
    """The sources of a board; they need not be there, now or ever."""
    maker = _Maker(sysroot=sysroot, clock=clock, work=work, limit_w=limit_w(profile))
    sensors = [one for one in profile.sensor.power if one.backend != "model"]
    partial = [one for one in sensors if one.rails and "total" not in one.rails]
    whole = [one for one in sensors if one not in partial]
    return Sources(
        named=tuple(maker.named(one) for one in whole),
        found=tuple(maker.found({one.backend for one in sensors})),
        partial=tuple(maker.named(one) for one in partial),
    )


def limit_w(profile: Profile) -> float:
    """Watts above which a reading cannot be true on this board."""
    energy = profile.energy
    known = [one.w for one in (*energy.idle, *energy.load)]
    known += [one.active_w for one in energy.point if one.active_w is not None]
    return _LIMIT_FACTOR * max(known) if known else _LIMIT_W
