"""The battery's plan and the hours of the day, over clocks that are set and gauges that fail."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from tidegate.edge.energy.governor_budget import BLIND_S, Budget
from tidegate.edge.energy.profile_files import read_library
from tidegate.edge.energy.sensors.sample import BatteryState
from tidegate.edge.energy.settings import EnergySettings
from tidegate.edge.energy.wall import local_time, next_time, quiet_for_s, seconds_between

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def test_the_next_time_is_ahead_today_or_tomorrow() -> None:
    assert next_time("12:01", NOON) == datetime(2026, 3, 1, 12, 1, tzinfo=UTC)
    assert next_time("12:00", NOON) == datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
    assert next_time("11:59", NOON) == datetime(2026, 3, 2, 11, 59, tzinfo=UTC)


@pytest.mark.parametrize(
    ("quiet", "hour", "hours"),
    [
        (("22:00", "07:00"), 23, 8),
        (("22:00", "07:00"), 6, 1),
        (("22:00", "07:00"), 7, 0),
        (("22:00", "07:00"), 22, 9),
        (("22:00", "07:00"), 12, 0),
        (("12:00", "14:00"), 12, 2),
        (("12:00", "14:00"), 14, 0),
        (("12:00", "14:00"), 11, 0),
    ],
)
def test_quiet_hours_may_cross_midnight(quiet: tuple[str, str], hour: int, hours: int) -> None:
    assert quiet_for_s(quiet, NOON.replace(hour=hour)) == hours * 3600
    assert quiet_for_s(None, NOON) == 0


class Clock:
    """A clock on the wall that can be set."""

    def __init__(self, now: datetime = NOON) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


def budget(
    until: str | None = "13:00", capacity_j: float | None = 100_000.0, wall: Clock | None = None
) -> Budget:
    profile = read_library().profile("ryzen-laptop")
    settings = EnergySettings(profile=profile, until=until, reserve_share=0.2)
    return Budget(settings=settings, capacity_j=capacity_j, wall=wall or Clock())


def battery(
    share: float,
    *,
    plugged: bool = False,
    drawn_w: float | None = None,
    left_j: float | None = None,
) -> BatteryState:
    return BatteryState(share=share, plugged=plugged, drawn_w=drawn_w, left_j=left_j)


def see(
    one: Budget,
    state: BatteryState | None,
    now_s: float,
    *,
    idle_w: float = 5.0,
    idling: bool = False,
) -> None:
    one.see(state, now_s=now_s, idle_w=idle_w, idling=idling)


def test_what_is_drawn_beyond_the_plan_is_owed() -> None:
    one = budget()
    see(one, battery(0.5, drawn_w=500.0), 0.0)
    assert one.debt.joules == 0  # drawn before there was a plan
    # (50 000 - 20 000) J in an hour are 8.33 W, 3.33 W above idling.
    view = one.view(0.0)
    assert view is not None
    assert view.allowed_w == pytest.approx(10 / 3)
    see(one, battery(0.5, drawn_w=15.0), 10.0)
    assert one.debt.joules == pytest.approx(100 - 33.3, abs=0.2)
    see(one, battery(0.5, plugged=True), 11.0)
    assert (one.debt.joules, one.view(11.0), one.share()) == (0.0, None, 1.0)
    see(one, battery(0.4), 12.0)
    assert one.debt.plan is not None
    assert one.share() == 0.4


@pytest.mark.parametrize("told_w", [2.0, 8.0, 0.0])
@pytest.mark.parametrize("gauge", ["watts", "joules", "percent"])
def test_the_reserve_is_left_at_the_time_whatever_the_costs_say_of_idling(
    told_w: float, gauge: str
) -> None:
    """The machine idles at 8 W; its processor's counter, or its costs, may know but 2 of them."""
    wall = Clock()
    one = budget("17:00", capacity_j=225e3, wall=wall)
    left_j, work_w = 225e3, 0.0
    for look in range(1799):
        now_s = look * 10.0
        wall.now = NOON + timedelta(seconds=now_s)
        state = {
            "watts": battery(left_j / 225e3, drawn_w=8.0 + work_w),
            "joules": battery(left_j / 225e3, left_j=left_j // 36 * 36),
            "percent": battery(math.ceil(100 * left_j / 225e3) / 100),
        }[gauge]
        see(one, state, now_s, idle_w=told_w, idling=work_w == 0)
        # Who spends all that is allowed, and stops for what is owed.
        work_w = 10.0 if one.debt.joules < 50 else 0.0
        left_j -= (8.0 + work_w) * 10
    assert 0.2 - 0.012 <= left_j / 225e3 < 0.22


def test_idling_is_learnt_from_the_battery_itself() -> None:
    one = budget("17:00", capacity_j=225e3)
    for second in range(60):
        see(one, battery(1.0, drawn_w=8.0), float(second), idle_w=2.0, idling=second > 0)
    view = one.view(59.0)
    assert view is not None
    assert view.allowed_w == pytest.approx(180e3 / (5 * 3600) - 8.0, abs=0.1)


def test_one_look_that_fails_clears_no_debt() -> None:
    one = budget()
    for second in range(11):
        see(one, battery(0.5, drawn_w=50.0), float(second))
    owed = one.debt.joules
    assert owed > 300
    see(one, None, 11.0)
    assert (one.debt.joules, one.share(), one.fault) == (owed, 0.5, None)
    assert one.view(11.0) is not None
    see(one, battery(0.5, drawn_w=50.0), 12.0)
    assert one.debt.joules > owed


def test_after_a_minute_without_a_battery_there_is_no_plan_until_it_is_back() -> None:
    one = budget()
    for second in range(11):
        see(one, battery(0.5, drawn_w=50.0), float(second))
    owed = one.debt.joules
    see(one, None, 11.0 + BLIND_S)
    assert (one.debt.plan, one.debt.joules, one.share()) == (None, 0.0, 0.5)
    assert one.fault == "no battery can be read: nothing lasts until 13:00"
    see(one, None, 20.0 + BLIND_S)
    see(one, battery(0.5, drawn_w=50.0), 30.0 + BLIND_S)
    assert one.debt.joules == owed
    assert one.view(30.0 + BLIND_S) is not None
    see(one, None, 40.0 + 2 * BLIND_S)
    see(one, battery(0.5, plugged=True), 50.0 + 2 * BLIND_S)
    see(one, battery(0.5, drawn_w=50.0), 51.0 + 2 * BLIND_S)
    assert one.debt.joules == 0


def test_once_the_time_has_come_there_is_no_plan_until_it_was_plugged_in(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    wall = Clock()
    one = budget(wall=wall)

    def at(seconds: int, *, plugged: bool = False) -> None:
        wall.now = NOON + timedelta(seconds=seconds)
        see(one, battery(0.5, drawn_w=50.0, plugged=plugged), float(seconds))

    for second in range(3590, 3600):
        at(second)
    assert one.debt.joules == 0, "30 kJ may be drawn in ten seconds"
    for second in (3600, 3601, 7200, 80_000, 90_000):
        at(second)
        assert (one.debt.plan, one.debt.joules, one.view(second)) == (None, 0.0, None)
    assert len([line for line in caplog.messages if "it is 13:00: no plan" in line]) == 1
    at(90_001, plugged=True)
    at(90_002)
    assert one.debt.plan is not None
    assert one.debt.plan.until_s == pytest.approx(86_400 + 86_400 + 3600)


def test_a_clock_that_is_set_moves_the_time_that_is_left() -> None:
    wall = Clock()
    one = budget(wall=wall)
    see(one, battery(0.5), 0.0)
    assert one.debt.plan is not None
    assert one.debt.plan.until_s == 3600
    wall.now = NOON - timedelta(hours=2)  # set back
    see(one, battery(0.5), 1.0)
    assert one.debt.plan.until_s == 1 + 3 * 3600
    wall.now = NOON + timedelta(minutes=30)
    see(one, battery(0.5), 2.0)
    assert one.debt.plan.until_s == 2 + 1800


def test_a_clock_that_was_years_behind_ends_no_plan() -> None:
    wall = Clock(datetime(1970, 1, 1, 0, 1, tzinfo=UTC))
    one = budget(wall=wall)
    see(one, battery(0.5), 0.0)
    wall.now = NOON
    see(one, battery(0.5), 1.0)
    assert one.debt.plan is not None
    assert one.debt.plan.until_s == 1 + 3600


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machine is where clocks go forward on 29 March 2026 and back on 25 October."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(
    ("now", "clock", "hours"),
    [
        (datetime(2026, 3, 28, 20, 0, tzinfo=UTC), "07:00", 9),  # from 21:00 over the night
        (datetime(2026, 10, 24, 19, 0, tzinfo=UTC), "07:00", 11),
        (datetime(2026, 10, 24, 20, 0, tzinfo=UTC), "21:30", 24.5),
        (datetime(2026, 10, 25, 0, 45, tzinfo=UTC), "02:50", 5 / 60),  # the first of two
        (datetime(2026, 10, 25, 1, 45, tzinfo=UTC), "02:50", 24 + 5 / 60),  # the second
    ],
)
def test_hours_over_a_change_of_clocks_are_those_that_pass(
    now: datetime, clock: str, hours: float
) -> None:
    local = now.astimezone(local_time().tzinfo)
    assert local.timestamp() == now.timestamp()
    assert seconds_between(local, next_time(clock, local)) == pytest.approx(hours * 3600)


@pytest.mark.usefixtures("berlin")
def test_quiet_hours_over_a_change_of_clocks_end_when_the_clock_says_so() -> None:
    local = datetime(2026, 3, 28, 22, 0, tzinfo=UTC).astimezone(local_time().tzinfo)
    assert quiet_for_s(("22:00", "07:00"), local) == 7 * 3600
    assert abs(local_time().timestamp() - time.time()) < 60


def test_a_time_that_cannot_be_reached_is_said_once_and_survived(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    one = budget()
    for number in range(20):
        share = 0.1 if number % 2 else 0.6
        see(one, battery(share, drawn_w=15.0), float(number))
    assert len([line for line in caplog.messages if "cannot last until 13:00" in line]) == 1
    assert math.isfinite(one.debt.joules)


def test_a_battery_that_says_nothing_is_a_fault_and_no_plan() -> None:
    one = budget(capacity_j=None)
    see(one, battery(0.5), 0.0)
    assert one.debt.plan is None
    assert one.fault is not None
    assert "does not say what it holds" in one.fault
    never = budget()
    see(never, None, 1.0)
    assert never.fault is not None
    assert "no battery can be read" in never.fault


def test_without_a_target_time_there_is_never_a_plan() -> None:
    one = budget(until=None)
    see(one, battery(0.05, drawn_w=100.0), 0.0)
    see(one, battery(0.05, drawn_w=100.0), 9.0)
    assert (one.debt.plan, one.debt.joules, one.fault) == (None, 0.0, None)
