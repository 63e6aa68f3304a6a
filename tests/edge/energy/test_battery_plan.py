"""A battery as a budget: what it allows, and the debt of what was drawn beyond it."""

from __future__ import annotations

import math

import pytest

from tidegate.edge.energy.battery_plan import BatteryPlan, EnergyDebt
from tidegate.errors import ConfigError

PLAN = BatteryPlan(reserve_j=1000.0, until_s=3600.0, idle_w=2.0)


def test_the_allowance_is_what_idling_and_the_reserve_leave() -> None:
    assert PLAN.allowed_w(0.0, 1000.0 + 3600 * 5.0) == pytest.approx(3.0)
    assert PLAN.allowed_w(0.0, 1000.0) == 0.0
    assert PLAN.allowed_w(3600.0, 500.0) == math.inf


def test_debt_grows_by_work_beyond_the_allowance_and_is_paid_by_doing_less() -> None:
    debt = EnergyDebt(plan=PLAN)
    left = 1000.0 + 3600 * 5.0  # 3 W of work
    debt.spent(50.0, 10.0, now_s=0.0, left_j=left)
    assert debt.joules == pytest.approx(20.0)
    debt.spent(0.0, 4.0, now_s=0.0, left_j=left)
    assert debt.joules == pytest.approx(8.0)
    debt.spent(0.0, 100.0, now_s=0.0, left_j=left)
    assert debt.joules == 0.0


def test_joules_of_a_moment_are_owed_and_without_a_plan_nothing_is() -> None:
    debt = EnergyDebt(plan=PLAN)
    debt.spent(5.0, 0.0, now_s=4000.0, left_j=0.0)
    assert debt.joules == 5.0
    free = EnergyDebt()
    free.spent(1e9, 1.0, now_s=0.0, left_j=0.0)
    assert free.joules == 0.0


@pytest.mark.parametrize(("reserve", "until"), [(-1.0, 10.0), (math.inf, 10.0), (0.0, math.inf)])
def test_a_plan_that_makes_no_sense_is_refused(reserve: float, until: float) -> None:
    with pytest.raises(ConfigError, match="battery"):
        BatteryPlan(reserve_j=reserve, until_s=until, idle_w=1.0)
