"""Batteries, from `/sys/class/power_supply`, and the power that they give while they discharge.

Drivers disagree on the sign of current, so only its amount is taken and the direction comes from
`status` (energy-and-devices 1.4), and from the plug, behind which the status may lag. Capacities
are energy (uWh), or charge (uAh) times the design's voltage, or the present one where the driver
does not say it. Batteries of a mouse or a headset (`scope` is Device) are none of the board's.

Source: Documentation/ABI/testing/sysfs-class-power.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tidegate.edge.energy.sensors.gauge import Gauged
from tidegate.edge.energy.sensors.reading import (
    matches,
    read_number,
    read_number_if,
    read_text,
    read_text_if,
)
from tidegate.edge.energy.sensors.sample import BatteryState
from tidegate.errors import SensorError

GLOB: Final = "/sys/class/power_supply/*"
_OUTSIDE: Final = ("Mains", "USB", "Wireless")
_UWH_J: Final = 3600e-6
_MOST_V: Final = 1000.0
_MOST_J: Final = 3.6e8
"""100 kWh: no battery of a small machine holds more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _One:
    """What one battery says."""

    status: str
    share: float
    full_j: float | None
    left_j: float | None
    flow_w: float | None
    raw: tuple[int | str, ...]

    def drawn_w(self, *, lags: bool) -> float | None:
        """Out of it; None where neither status nor driver says.

        Args:
            lags: the status is of before the plug was pulled: what flows flows out.
        """
        if lags and self.flow_w:
            return self.flow_w
        if self.status in ("Full", "Not charging"):
            return 0.0
        if self.flow_w is None or self.status not in ("Discharging", "Charging"):
            return None
        return self.flow_w if self.status == "Discharging" else -self.flow_w


class Batteries:
    """The board's batteries, as one."""

    name = "power_supply"

    def __init__(self, *, sysroot: Path, pattern: str = GLOB) -> None:
        self._sysroot = sysroot
        self._pattern = pattern

    def state(self) -> BatteryState | None:
        """All batteries together; None where the board has none.

        Raises:
            SensorError: there is one, and it cannot be read or says what cannot be true.
        """
        supplies = self._supplies()
        found = [_battery(folder) for folder, kind in supplies if kind == "Battery"]
        if not found:
            return None
        plugged = _plugged(supplies, found)
        return BatteryState(
            share=_share(found),
            plugged=plugged,
            full_j=_sum([one.full_j for one in found]),
            left_j=_sum([one.left_j for one in found]),
            drawn_w=_drawn_w(found, plugged=plugged),
        )

    def read(self) -> Gauged:
        """See `Gauge.read`: what the batteries give, while nothing comes from outside."""
        supplies = self._supplies()
        found = [_battery(folder) for folder, kind in supplies if kind == "Battery"]
        if not found:
            raise SensorError(f"{self._pattern}: there is no battery")
        if _plugged(supplies, found):
            raise SensorError("plugged in: the battery does not tell what is drawn")
        drawn_w = _drawn_w(found, plugged=False)
        if drawn_w is None:
            raise SensorError(f"{self._pattern}: no power or current is given")
        return Gauged(rails={"total": drawn_w}, raw=sum((one.raw for one in found), ()))

    def _supplies(self) -> list[tuple[Path, str]]:
        """Folder and type of what belongs to the board and is there."""
        found = []
        for folder in matches(self._sysroot, self._pattern):
            kind = read_text_if(folder / "type")
            if kind is None or read_text_if(folder / "scope") == "Device":
                continue
            if kind == "Battery" and read_number_if(folder / "present") == 0:
                continue
            found.append((folder, kind))
        return found


def _battery(folder: Path) -> _One:
    status = read_text(folder / "status")
    volts = _volts(folder, "voltage_now")
    design = _volts(folder, "voltage_min_design") or volts
    full_j, left_j = _joules(folder, "full", design), _joules(folder, "now", design)
    if full_j is not None and not 0 < full_j <= _MOST_J:
        raise SensorError(f"{folder}: a full battery of {full_j:.3g} J cannot be")
    if left_j is not None and not 0 <= left_j <= _MOST_J:
        raise SensorError(f"{folder}: {left_j:.3g} J left cannot be")
    percent = read_number_if(folder / "capacity")
    if full_j is not None and left_j is not None:
        # Old batteries report somewhat more than their full charge; far more is nonsense.
        share = left_j / full_j
    elif percent is not None:
        share = percent / 100
    else:
        raise SensorError(f"{folder}: neither energy, charge nor capacity is given")
    if not 0 <= share <= 1.5:
        raise SensorError(f"{folder}: {share:.0%} of a full battery cannot be")
    flow_w, raw = _flow(folder, volts)
    return _One(
        status=status,
        share=min(1.0, share),
        full_j=full_j,
        left_j=left_j,
        flow_w=flow_w,
        raw=(status, *raw),
    )


def _volts(folder: Path, name: str) -> float | None:
    microvolts = read_number_if(folder / name)
    if microvolts is not None and not 0 <= microvolts <= _MOST_V * 1e6:
        raise SensorError(f"{folder / name}: {microvolts} uV cannot be")
    return microvolts / 1e6 if microvolts else None


def _joules(folder: Path, when: str, volts: float | None) -> float | None:
    energy = read_number_if(folder / f"energy_{when}")
    if energy is not None:
        return energy * _UWH_J
    charge = read_number_if(folder / f"charge_{when}")
    return None if charge is None or volts is None else charge * volts * _UWH_J


def _flow(folder: Path, volts: float | None) -> tuple[float | None, tuple[int, ...]]:
    """Watts in or out, and the numbers that they come from."""
    power = read_number_if(folder / "power_now")
    if power is not None:
        return abs(power) / 1e6, (power,)
    current = read_number_if(folder / "current_now")
    if current is None or volts is None:
        return None, ()
    microvolts = read_number(folder / "voltage_now")
    return abs(current) / 1e6 * volts, (current, microvolts)


def _plugged(supplies: Sequence[tuple[Path, str]], found: Sequence[_One]) -> bool:
    """Some supply is online; where no mains says, a battery that is charged tells of another."""
    online = {
        folder: number
        for folder, kind in supplies
        if kind in _OUTSIDE and (number := read_number_if(folder / "online")) is not None
    }
    if any(online.values()):
        return True
    if not online:
        return all(one.status != "Discharging" for one in found)
    mains = any(kind == "Mains" and folder in online for folder, kind in supplies)
    return not mains and any(one.status == "Charging" for one in found)


def _drawn_w(found: Sequence[_One], *, plugged: bool) -> float | None:
    """Out of all of them; without a plug one must be giving power, whatever they still say."""
    lags = not plugged and all(one.status != "Discharging" for one in found)
    return _sum([one.drawn_w(lags=lags) for one in found])


def _share(found: Sequence[_One]) -> float:
    """By joules where every battery says its own, else their mean."""
    full, left = _sum([one.full_j for one in found]), _sum([one.left_j for one in found])
    if full and left is not None:
        return min(1.0, left / full)
    return sum(one.share for one in found) / len(found)


def _sum(numbers: Sequence[float | None]) -> float | None:
    """None where one is unknown."""
    known = [one for one in numbers if one is not None]
    return sum(known) if len(known) == len(numbers) else None
