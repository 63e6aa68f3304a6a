"""A battery as a budget: how many watts of work the plan allows, and what was drawn beyond them.

    allowed watts   rho = max(0, (left - reserve) / (until - now) - idle watts)
    energy debt     Z <- max(0, Z + joules of work - rho * seconds)

The debt is what PACE's decisions see. Plugged in, there is no plan and no debt.
Source: energy-and-devices 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tidegate.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class BatteryPlan:
    """What the owner wants of the battery.

    Args:
        reserve_j: to be left at the end.
        until_s: the time on the plan's clock that it shall last to.
        idle_w: watts of the device when it does nothing.

    Raises:
        ConfigError: the reserve is negative or the time is not finite.
    """

    reserve_j: float
    until_s: float
    idle_w: float

    def __post_init__(self) -> None:
        if not 0 <= self.reserve_j < math.inf:
            raise ConfigError("battery.reserve_j", self.reserve_j, "0 or more, and finite")
        if not math.isfinite(self.until_s):
            raise ConfigError("battery.until_s", self.until_s, "a finite time")

    def allowed_w(self, now_s: float, left_j: float) -> float:
        """Watts of work above idle; all there is once the time has come."""
        if now_s >= self.until_s:
            return math.inf
        return max(0.0, (left_j - self.reserve_j) / (self.until_s - now_s) - self.idle_w)


@dataclass(kw_only=True, slots=True)
class EnergyDebt:
    """Z, kept up to date. Without a plan it is always nothing."""

    plan: BatteryPlan | None = None
    joules: float = 0.0

    def spent(self, work_j: float, seconds: float, *, now_s: float, left_j: float) -> None:
        """Count `work_j` above idle, drawn in the `seconds` up to `now_s`."""
        if self.plan is None:
            self.joules = 0.0
            return
        allowed_w = self.plan.allowed_w(now_s, left_j)
        self.joules = (
            max(0.0, self.joules + work_j - allowed_w * seconds)
            if seconds
            else (self.joules + work_j)
        )
