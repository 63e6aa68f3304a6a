"""The owner's wishes as seconds on the governor's clock: a battery's plan, its debt, quiet hours.

What is charged to the plan is what the battery itself says to have given, idling and all: the
sensors of the ledger may cover less of the machine. Target times are local ones, so they are taken
from the wall at every look: a clock that is set, or daylight saving, moves them. Plugged in there
is no plan and no debt; nor is there a plan once its time has come, until it was plugged in again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from tidegate.edge.energy.battery_plan import BatteryPlan, EnergyDebt
from tidegate.edge.energy.battery_use import BatteryUse
from tidegate.edge.energy.governor_view import PlanView
from tidegate.edge.energy.sensors.sample import BatteryState
from tidegate.edge.energy.settings import EnergySettings
from tidegate.edge.energy.wall import Wall, local_time, next_time, quiet_for_s, seconds_between

_log = logging.getLogger(__name__)

BLIND_S: Final = 60.0
"""That a plan goes on while the battery cannot be read."""
_DAY_S: Final = 86400.0


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
    """As it was last read."""
    fault: str | None = None
    """Why there is no plan though one is wanted."""
    _use: BatteryUse = field(default_factory=BatteryUse)
    _target: datetime | None = None
    _over: bool = False
    """The time came, and power has not come from outside since."""
    _left_j: float = 0.0
    _read_s: float | None = None
    _aside_j: float = 0.0
    """Debt that is not acted on while the battery cannot be read."""
    _told: str | None = None
    _cannot: bool = False

    def see(
        self, battery: BatteryState | None, *, now_s: float, idle_w: float, idling: bool
    ) -> None:
        """A new look.

        Args:
            battery: None where there is none, or none that can be read.
            now_s: of the governor's clock.
            idle_w: of the device by its costs, until the battery was seen while it idled.
            idling: whether nothing has run since the look before.
        """
        if self.settings.until is None:
            self.battery = battery
            return
        if battery is None:
            self._see_nothing(now_s)
        elif battery.plugged:
            self.battery, self._read_s = battery, now_s
            self._end()
        else:
            self.battery, self._read_s = battery, now_s
            self._follow(battery, now_s, idle_w, idling=idling)
        self._tell(now_s)

    def quiet_until_s(self, now_s: float) -> float:
        """On the governor's clock; 0 outside quiet hours."""
        quiet_s = quiet_for_s(self.settings.quiet, self.wall())
        return now_s + quiet_s if quiet_s else 0.0

    def share(self) -> float:
        """Of a full battery, as it was last read; 1 where power comes from outside."""
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

    def _see_nothing(self, now_s: float) -> None:
        """For a while it goes on as it was; then there is no plan, and its debt is put aside."""
        if self._read_s is not None and now_s - self._read_s <= BLIND_S:
            return
        self._aside_j += self.debt.joules
        self.debt.joules, self.debt.plan = 0.0, None
        self._use.restart()
        self.fault = f"no battery can be read: nothing lasts until {self.settings.until}"

    def _end(self) -> None:
        """Power comes from outside: nothing is owed."""
        self._target, self._over, self.fault = None, False, None
        self.debt.plan, self.debt.joules, self._aside_j = None, 0.0, 0.0
        self._use.restart()

    def _follow(self, battery: BatteryState, now_s: float, idle_w: float, *, idling: bool) -> None:
        assert self.settings.until is not None, "see asks first"
        self.fault = None
        full_j = battery.full_j if battery.full_j is not None else self.capacity_j
        if full_j is None or full_j <= 0:
            self.fault = "the battery does not say what it holds, nor does the profile: no plan"
            self.debt.plan = None
            return
        self._left_j = battery.share * full_j if battery.left_j is None else battery.left_j
        used = self._use.see(battery, now_s=now_s, left_j=self._left_j, idling=idling)
        left_s = self._left_s(self.settings.until)
        if left_s is None:
            self.debt.plan, self.debt.joules, self._aside_j = None, 0.0, 0.0
            return
        idle_w = idle_w if self._use.idle_w is None else self._use.idle_w
        planned = self.debt.plan is not None
        self.debt.plan = BatteryPlan(
            reserve_j=self.settings.reserve_share * full_j, until_s=now_s + left_s, idle_w=idle_w
        )
        self.debt.joules, self._aside_j = self.debt.joules + self._aside_j, 0.0
        if planned and used is not None:  # what was drawn before there was a plan is not its debt
            work_j = used.joules - idle_w * used.seconds
            self.debt.spent(work_j, used.seconds, now_s=now_s, left_j=self._left_j)

    def _left_s(self, until: str) -> float | None:
        """To the target; None once it has come."""
        now, target = self.wall(), self._target
        if target is not None and (past_s := seconds_between(target, now)) >= 0:
            # A clock that leaps by days was wrong before, as on a board without a battery for it.
            self._over = self._over or past_s < _DAY_S
            self.debt.joules = 0.0
        self._target = next_time(until, now)
        return None if self._over else seconds_between(now, self._target)

    def _tell(self, now_s: float) -> None:
        """Say once what has changed."""
        plan, until = self.debt.plan, self.settings.until
        if plan is None and self._over:
            told = f"it is {until}: no plan for the battery until it was plugged in"
        elif plan is None:
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
