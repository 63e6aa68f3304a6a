"""How a board warms up: first-order poles from watts to kelvin, in closed form.

    dx/dt = (r * watts - x) / tau        temperature = surroundings + sum of x

Between two changes of power nothing has to be stepped: the state after any time is exact, and so is
the warmest mode that stays below a limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tidegate.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatPole:
    """Kelvin per watt, and the seconds in which 63 % of them have come."""

    r_kw: float
    tau_s: float

    def __post_init__(self) -> None:
        for name in ("r_kw", "tau_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"thermal.pole.{name}", getattr(self, name), "more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Heat:
    """A board's temperature and where it comes from.

    Args:
        poles: of the die, of the heatsink.
        warmth_k: of each pole, above the surroundings.
        ambient_c: the surroundings.
    """

    poles: tuple[HeatPole, ...]
    warmth_k: tuple[float, ...]
    ambient_c: float

    @staticmethod
    def settled(poles: Sequence[HeatPole], ambient_c: float, watts: float) -> Heat:
        """A board that has drawn `watts` for long."""
        warmth = tuple(pole.r_kw * watts for pole in poles)
        return Heat(poles=tuple(poles), warmth_k=warmth, ambient_c=ambient_c)

    @property
    def now_c(self) -> float:
        """The temperature, in degrees Celsius."""
        return self.ambient_c + sum(self.warmth_k)

    def after(self, watts: float, seconds: float) -> Heat:
        """What it is after `seconds` at constant `watts`."""
        warmth = tuple(
            pole.r_kw * watts + (now_k - pole.r_kw * watts) * math.exp(-seconds / pole.tau_s)
            for pole, now_k in zip(self.poles, self.warmth_k, strict=True)
        )
        return Heat(poles=self.poles, warmth_k=warmth, ambient_c=self.ambient_c)

    def kelvin_per_watt(self, seconds: float) -> float:
        """That one more watt adds within `seconds`."""
        return sum(pole.r_kw * -math.expm1(-seconds / pole.tau_s) for pole in self.poles)

    def most_watts(self, limit_c: float, seconds: float) -> float:
        """Constant watts with which the board is at `limit_c` after `seconds`."""
        left_c = self.after(0.0, seconds).now_c
        per_watt = self.kelvin_per_watt(seconds)
        return max(0.0, (limit_c - left_c) / per_watt) if per_watt else math.inf
