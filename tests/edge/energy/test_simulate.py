"""The simulator: nothing is lost or made up, and no policy beats the bound."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from energyboard import BOARD, CLOUD, RADIO
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.edge.energy.battery_plan import BatteryPlan
from tidegate.edge.energy.heat import Heat, HeatPole
from tidegate.edge.energy.pace import Pace
from tidegate.edge.energy.simulate.bound import BoundError, lower_bound
from tidegate.edge.energy.simulate.families import FAMILIES, MIXES, jobs_of, stretch_for
from tidegate.edge.energy.simulate.jobs import Job
from tidegate.edge.energy.simulate.policies import policies
from tidegate.edge.energy.simulate.run import Outcome, Setup, simulate

DEFAULT = 1
SETUP = Setup(costs=BOARD, radio=RADIO, cloud=CLOUD, start_mode=DEFAULT)
POLICIES = policies(BOARD, default_mode=DEFAULT, radio=RADIO, cloud=CLOUD, battery=True)
PACE = POLICIES["pace"]


def alone_s(prompt: int, output: int) -> float:
    return BOARD.request_s(DEFAULT, prompt, output)


def family(kind: str, requests: int, utilisation: float, seed: int = 1) -> list[Job]:
    arrivals = FAMILIES[kind](requests, seed)
    stretch = stretch_for(arrivals, alone_s, utilisation)
    return jobs_of(arrivals, kind, seed, stretch=stretch, alone_s=alone_s)


def few(seed: int, count: int) -> list[Job]:
    """A small instance in which everything can be in time."""
    chance = random.Random(seed)
    at_s, jobs = 0.0, []
    for number in range(count):
        at_s += chance.expovariate(0.3)
        prompt, output = chance.randint(5, 200), chance.randint(2, 60)
        slack_s = 6.0 + chance.uniform(2, 6) * alone_s(prompt, output)
        jobs.append(
            Job(
                id=f"j{number}",
                kind="few",
                arrives_s=at_s,
                prompt_tokens=prompt,
                output_tokens=output,
                deadline_s=at_s + slack_s,
                private=chance.random() < 0.5,
            )
        )
    return jobs


def ends_of(jobs: list[Job], outcome: Outcome) -> list[float]:
    """When each may end for the bound to hold for the policy too."""
    ended = {one.job.id: one.at_s for one in outcome.ended}
    return [max(job.deadline_s, ended[job.id]) for job in jobs]


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_job_ends_once_and_joules_are_those_of_the_time_it_took(name: str, kind: str) -> None:
    jobs = family(kind, 60, 0.7)
    outcome = simulate(jobs, SETUP, POLICIES[name])
    assert sorted(one.job.id for one in outcome.ended) == sorted(job.id for job in jobs)
    assert outcome.unserved == 0
    for one in outcome.ended:
        assert one.at_s > one.job.arrives_s
        assert not (one.job.private and one.route == "cloud")
    watts = [max(mode.prefill_w, mode.decode_w) for mode in BOARD.modes]
    meter = outcome.meter
    assert meter.idle_j == pytest.approx(BOARD.idle_w * outcome.seconds)
    assert 0 <= meter.work_j + meter.parked_j <= (max(watts) - BOARD.idle_w) * outcome.seconds


def test_one_job_costs_what_the_model_says() -> None:
    job = Job(
        id="a", kind="x", arrives_s=1.0, prompt_tokens=100, output_tokens=20, deadline_s=1000.0
    )
    outcome = simulate([job], replace(SETUP, cloud=None), POLICIES["local"])
    (ended,) = outcome.ended
    assert ended.at_s == pytest.approx(1.0 + BOARD.request_s(DEFAULT, 100, 20))
    assert outcome.meter.work_j == pytest.approx(BOARD.request_j(DEFAULT, 100, 20))
    assert outcome.meter.parked_j == pytest.approx(1.0 * 0.5)


def test_the_same_jobs_and_settings_give_the_same_result() -> None:
    first, second = (simulate(family("conv", 80, 0.9), SETUP, PACE) for _ in range(2))
    assert first == second


def test_a_network_that_is_gone_delays_what_left_and_keeps_the_rest_here() -> None:
    jobs = [replace(job, private=False) for job in family("conv", 30, 0.5)]
    away = replace(SETUP, outages=((0.0, jobs[-1].arrives_s + 1.0),))
    assert simulate(jobs, away, PACE).offloaded == 0
    one = replace(jobs[0], arrives_s=5.0, deadline_s=500.0)
    outcome = simulate([one], replace(SETUP, outages=((5.1, 50.0),)), POLICIES["cloud"])
    assert outcome.ended[0].route == "cloud"
    assert outcome.ended[0].at_s > 50.0


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 6), rows=st.sampled_from((1, 4)))
def test_no_policy_beats_the_bound_and_whole_requests_cost_at_least_parts(
    seed: int, count: int, rows: int
) -> None:
    jobs, costs = few(seed, count), replace(BOARD, rows=rows)
    setup = replace(SETUP, costs=costs, clairvoyant=True)
    pace = Pace(costs=costs, radio=RADIO, cloud=CLOUD)
    outcome = simulate(jobs, setup, pace)
    until = ends_of(jobs, outcome)
    parts = lower_bound(jobs, costs, radio=RADIO, cloud=CLOUD, until_s=until)
    whole = lower_bound(jobs, costs, radio=RADIO, cloud=CLOUD, until_s=until, whole=True)
    reached = outcome.meter.system_j + outcome.meter.price
    assert parts.joules <= whole.joules * (1 + 1e-6) + 1e-6
    assert whole.joules <= reached * (1 + 1e-6) + 1e-6


def test_one_job_with_time_costs_the_bound_exactly() -> None:
    job = Job(
        id="a", kind="x", arrives_s=0.0, prompt_tokens=100, output_tokens=20, deadline_s=1000.0
    )
    bound = lower_bound([job], BOARD)
    assert bound.joules == pytest.approx(BOARD.request_j(BOARD.knee, 100, 20))


def test_deadlines_that_nothing_meets_have_no_bound() -> None:
    job = Job(
        id="a", kind="x", arrives_s=0.0, prompt_tokens=1000, output_tokens=200, deadline_s=1.0
    )
    with pytest.raises(BoundError, match="no schedule"):
        lower_bound([job], BOARD)


@pytest.mark.parametrize("utilisation", [0.3, 0.8])
def test_pace_takes_fewer_joules_than_the_delivered_mode_and_misses_no_more(
    utilisation: float,
) -> None:
    jobs = family("conv", 200, utilisation)
    delivered = policies(BOARD, default_mode=BOARD.fastest, radio=RADIO, cloud=CLOUD)
    ours, edf = (simulate(jobs, SETUP, delivered[name]) for name in ("pace", "edf"))
    assert ours.missed <= edf.missed
    assert ours.meter.system_j + ours.meter.price < 0.9 * edf.meter.system_j


def test_heat_stays_below_the_hard_limit_with_pace() -> None:
    poles = (HeatPole(r_kw=2.0, tau_s=5.0), HeatPole(r_kw=2.5, tau_s=120.0))
    hot = replace(
        SETUP,
        cloud=None,
        heat=Heat.settled(poles, 30.0, 1.0),
        soft_c=55.0,
        hard_c=65.0,
        keep_line=True,
    )
    jobs = family("conv", 120, 1.5)
    outcome = simulate(jobs, hot, Pace(costs=BOARD))
    assert outcome.meter.hard_s == 0
    assert max(celsius for _, celsius, _ in outcome.line) > 50.0, "it was warm at all"
    cold = simulate(jobs, replace(hot, heat=None), Pace(costs=BOARD))
    assert outcome.missed >= cold.missed


def test_what_is_drawn_between_events_changes_nothing_and_falls_as_a_board_cools() -> None:
    poles = (HeatPole(r_kw=2.0, tau_s=5.0), HeatPole(r_kw=2.5, tau_s=120.0))
    setup = replace(SETUP, heat=Heat.settled(poles, 30.0, 1.0), battery_j=1e6)
    jobs = family("home", 30, 0.2)
    drawn = simulate(jobs, replace(setup, keep_line=True), PACE)
    assert replace(drawn, line=()) == simulate(jobs, setup, PACE)
    times = [at_s for at_s, _, _ in drawn.line]
    left = [battery_j for _, _, battery_j in drawn.line]
    assert times == sorted(times)
    assert all(after <= before + 1e-6 for before, after in pairwise(left))
    longest_s = max(after - before for before, after in pairwise(times))
    assert longest_s < 0.5 * max(
        after.arrives_s - before.arrives_s for before, after in pairwise(jobs)
    )


def test_a_battery_lasts_to_its_time_where_the_plan_is_kept() -> None:
    jobs = family("conv", 150, 0.8)
    until_s = jobs[-1].arrives_s
    battery_j = until_s * 2.0
    plan = BatteryPlan(reserve_j=0.0, until_s=until_s, idle_w=BOARD.idle_w)
    setup = replace(SETUP, battery_j=battery_j, plan=plan)
    with_plan = simulate(jobs, setup, PACE)
    without = simulate(jobs, setup, POLICIES["local"])
    assert without.empty_s < until_s
    assert with_plan.empty_s > without.empty_s


def test_an_empty_battery_is_the_end_to_the_second_and_whoever_runs_is_unserved() -> None:
    job = Job(
        id="a", kind="x", arrives_s=100.0, prompt_tokens=100, output_tokens=60, deadline_s=900.0
    )
    idle = simulate([job], replace(SETUP, battery_j=30.0), POLICIES["local"])
    assert idle.empty_s == pytest.approx(30.0 / 1.5)
    assert (idle.unserved, idle.missed, idle.ended) == (1, 1, ())
    dies = simulate([job], replace(SETUP, battery_j=100 * 1.5 + 6.0), POLICIES["local"])
    assert dies.empty_s == pytest.approx(101.0)
    assert dies.unserved == 1
    assert dies.battery_j == pytest.approx(0.0, abs=1e-6)


def test_times_late_in_a_trace_do_not_stand_still() -> None:
    late = [
        replace(job, arrives_s=job.arrives_s + 3e6, deadline_s=job.deadline_s + 3e6)
        for job in family("conv", 40, 0.9)
    ]
    outcome = simulate(late, SETUP, PACE)
    assert len(outcome.ended) == 40


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_families_are_drawn_by_their_seed_and_sized_for_a_device(kind: str) -> None:
    first, again, other = (FAMILIES[kind](50, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert all(one.prompt_tokens <= 2048 and one.output_tokens <= 512 for one in first)
    assert [one.at_s for one in first] == sorted(one.at_s for one in first)
    assert kind in MIXES
    jobs = family(kind, 50, 0.5)
    busy_s = sum(alone_s(job.prompt_tokens, job.output_tokens) for job in jobs)
    assert busy_s / (jobs[-1].arrives_s - jobs[0].arrives_s) == pytest.approx(0.5)
    assert all(math.isfinite(job.deadline_s) for job in jobs)
