"""Warming up: the closed form is what small steps come to, and its inverse is one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.edge.energy.heat import Heat, HeatPole
from tidegate.errors import ConfigError

POLES = (HeatPole(r_kw=0.7, tau_s=5.0), HeatPole(r_kw=0.5, tau_s=200.0))
watts = st.floats(0, 40)
seconds = st.floats(0, 600)


@given(watts=watts, seconds=seconds)
def test_the_closed_form_is_what_small_steps_come_to(watts: float, seconds: float) -> None:
    warmth = [3.0, 1.0]
    steps = 4000
    for _ in range(steps):
        for n, pole in enumerate(POLES):
            warmth[n] += (pole.r_kw * watts - warmth[n]) / pole.tau_s * (seconds / steps)
    begun = Heat(poles=POLES, warmth_k=(3.0, 1.0), ambient_c=25.0)
    assert begun.after(watts, seconds).now_c == pytest.approx(25.0 + sum(warmth), abs=0.25)


@given(watts=watts, first=seconds, second=seconds)
def test_two_steps_are_one(watts: float, first: float, second: float) -> None:
    begun = Heat.settled(POLES, 25.0, 5.0)
    once = begun.after(watts, first + second).now_c
    assert begun.after(watts, first).after(watts, second).now_c == pytest.approx(once, abs=1e-9)


@given(limit_c=st.floats(40, 90), seconds=st.floats(1, 600))
def test_the_most_watts_lead_to_the_limit_and_no_further(limit_c: float, seconds: float) -> None:
    begun = Heat.settled(POLES, 25.0, 5.0)
    most = begun.most_watts(limit_c, seconds)
    if most > 0:
        assert begun.after(most, seconds).now_c == pytest.approx(limit_c)
    else:
        assert begun.after(0.0, seconds).now_c >= limit_c


def test_a_board_that_drew_the_same_for_long_stays_as_it_is() -> None:
    settled = Heat.settled(POLES, 25.0, 10.0)
    assert settled.now_c == pytest.approx(25.0 + 10 * 1.2)
    assert settled.after(10.0, 1e6).now_c == pytest.approx(settled.now_c)


@pytest.mark.parametrize(("r_kw", "tau_s"), [(0.0, 5.0), (1.0, 0.0), (float("nan"), 5.0)])
def test_a_pole_that_makes_no_sense_is_refused(r_kw: float, tau_s: float) -> None:
    with pytest.raises(ConfigError, match=r"thermal\.pole"):
        HeatPole(r_kw=r_kw, tau_s=tau_s)
