"""The owner's wishes as seconds on the governor's clock: a battery's plan, its debt, quiet hours.

Target times are local ones, so they are taken from the wall at every look: a clock that is set, or
daylight saving, moves them. Plugged in there is no plan and no debt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tidegate.edge.energy.battery_plan import BatteryPlan, EnergyDebt
from tidegate.edge.energy.governor_view import PlanView
from tidegate.edge.energy.sensors.sample import BatteryState
from tidegate.edge.energy.settings import EnergySettings

_log = logging.getLogger(__name__)

Wall = Callable[[], datetime]
"""The local time, with its zone."""


def local_time() -> datetime:
    """Of the machine's zone."""
    return datetime.now().astimezone()


def next_time(clock: str, now: datetime) -> datetime:
    """The next moment after `now` at which it is `clock`, `HH:MM`, in the zone of `now`."""
    hour, minute = (int(part) for part in clock.split(":"))
    today = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return today if today > now else today + timedelta(days=1)


def quiet_for_s(quiet: tuple[str, str] | None, now: datetime) -> float:
    """Seconds until quiet hours end; 0 outside them."""
    if quiet is None:
        return 0.0
    end = next_time(quiet[1], now)
    # Within them exactly if they end before they begin again.
    return (end - now).total_seconds() if end < next_time(quiet[0], now) else 0.0


@dataclass(kw_only=True)
class Budget:
    """Follows the battery against the owner's plan.

    Args:
        settings: what is wanted.
        capacity_j: of a full battery where it does not say so itself; None: unknown.
        wall: tells the local time.
    """

    settings: EnergySettings
    capacity_j: float | None
    wall: Wall = local_time
    debt: EnergyDebt = field(default_factory=EnergyDebt)
    battery: BatteryState | None = None
    fault: str | None = None
    """Why there is no plan though one is wanted."""
    _target: datetime | None = None
    _left_j: float = 0.0
    _at_s: float | None = None
    _told: str | None = None
    _cannot: bool = False

    def see(
        self, battery: BatteryState | None, *, now_s: float, work_j: float, idle_w: float
    ) -> None:
        """A new look.

        Args:
            battery: None where there is none, or none that can be read.
            now_s: of the governor's clock.
            work_j: drawn above idling since the look before.
            idle_w: of the device.
        """
        since_s = 0.0 if self._at_s is None else max(0.0, now_s - self._at_s)
        self.battery, self._at_s = battery, now_s
        was_planned = self.debt.plan is not None
        self.debt.plan = self._plan(battery, now_s, idle_w)
        if self.debt.plan is None:
            self.debt.joules = 0.0
        elif was_planned:  # what was drawn before there was a plan is not its debt
            self.debt.spent(work_j, since_s, now_s=now_s, left_j=self._left_j)
        self._tell(now_s)

    def quiet_until_s(self, now_s: float) -> float:
        """On the governor's clock; 0 outside quiet hours."""
        quiet_s = quiet_for_s(self.settings.quiet, self.wall())
        return now_s + quiet_s if quiet_s else 0.0

    def share(self) -> float:
        """Of a full battery; 1 where power comes from outside."""
        return 1.0 if self.battery is None or self.battery.plugged else self.battery.share

    def view(self, now_s: float) -> PlanView | None:
        """For people."""
        plan = self.debt.plan
        if plan is None or self.settings.until is None:
            return None
        return PlanView(
            until=self.settings.until,
            left_s=max(0.0, plan.until_s - now_s),
            reserve_j=plan.reserve_j,
            allowed_w=plan.allowed_w(now_s, self._left_j) if now_s < plan.until_s else 0.0,
        )

    def _plan(
        self, battery: BatteryState | None, now_s: float, idle_w: float
    ) -> BatteryPlan | None:
        settings = self.settings
        self.fault = None
        if settings.until is None or battery is None or battery.plugged:
            self._target = None
            if settings.until is not None and battery is None:
                self.fault = f"no battery can be read: nothing lasts until {settings.until}"
            return None
        full_j = battery.full_j if battery.full_j is not None else self.capacity_j
        if battery.left_j is not None:
            self._left_j = battery.left_j
        elif full_j is not None:
            self._left_j = battery.share * full_j
        if full_j is None or full_j <= 0:
            self.fault = "the battery does not say what it holds, nor does the profile: no plan"
            return None
        now = self.wall()
        if self._target is None or self._target <= now:
            self._target = next_time(settings.until, now)
        left_s = (self._target - now).total_seconds()
        return BatteryPlan(
            reserve_j=settings.reserve_share * full_j, until_s=now_s + left_s, idle_w=idle_w
        )

    def _tell(self, now_s: float) -> None:
        """Say once what has changed."""
        plan, until = self.debt.plan, self.settings.until
        if until is None:
            return
        if plan is None:
            told = self.fault or "power comes from outside: no plan for the battery"
        elif plan.allowed_w(now_s, self._left_j) <= 0:
            told = (
                f"the battery cannot last until {until} with its reserve: idling alone takes"
                " more; work is sent away or put off where it may be"
            )
        else:
            told = f"the battery is planned to last until {until}"
        goes_on = plan is not None and self._cannot and told.startswith("the battery is planned")
        if told != self._told and not goes_on:  # at the border it would be said at every look
            self._told = told
            self._cannot = told.startswith("the battery cannot")
            _log.info("energy: %s", told)
