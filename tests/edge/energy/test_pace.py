"""PACE: what is private stays, deadlines decide the mode, and nothing flaps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from energyboard import BOARD, CLOUD, RADIO
from energyboard import SLOW as SLOW_MODE
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.edge.energy.pace import Pace
from tidegate.edge.energy.pace_order import by_deadline, hopeful_first
from tidegate.edge.energy.pace_prices import cloud_prices, local_prices, speed
from tidegate.edge.energy.pace_state import NEVER, PaceState, Running, Waiting, Weights
from tidegate.errors import ConfigError

PACE = Pace(costs=BOARD, radio=RADIO, cloud=CLOUD)
SLOW, KNEE, FAST = range(3)


def asks(name: str = "a", **changed: Any) -> Waiting:
    usual = Waiting(
        id=name,
        prompt_tokens=100,
        output_mean=50.0,
        output_p90=80.0,
        output_most=100.0,
        arrived_s=100.0,
    )
    return replace(usual, **changed)


def runs(**changed: Any) -> Running:
    usual = Running(
        prefill_tokens=0.0,
        output_mean=50.0,
        output_p90=80.0,
        output_most=100.0,
        context_tokens=150.0,
    )
    return replace(usual, **changed)


def state(*waiting: Waiting, running: tuple[Running, ...] = (), **changed: Any) -> PaceState:
    usual = PaceState(now_s=100.0, mode=KNEE, mode_since_s=0.0, waiting=waiting, running=running)
    return replace(usual, **changed)


def _begun(now: PaceState) -> list[str]:
    """Who begins, in order, if each prompt is computed at once and nobody ends."""
    begun: list[str] = []
    while start := PACE.decide(now).start:
        (name,) = start
        begun.append(name)
        (one,) = [one for one in now.waiting if one.id == name]
        row = runs(
            context_tokens=float(one.prompt_tokens),
            deadline_s=one.deadline_s,
            may_wait=one.may_wait,
        )
        rest = [one for one in now.waiting if one.id != name]
        now = replace(now, waiting=rest, running=(*now.running, row))
    return begun


requests = st.builds(
    asks,
    name=st.uuids().map(str),
    prompt_tokens=st.integers(1, 2000),
    output_mean=st.floats(1, 200),
    output_p90=st.floats(200, 400),
    output_most=st.floats(400, 600),
    deadline_s=st.one_of(st.just(NEVER), st.floats(90, 400)),
    may_leave=st.booleans(),
    may_stay=st.booleans(),
    may_wait=st.booleans(),
)
states = st.builds(
    lambda waiting, running, **changed: state(*waiting, running=tuple(running), **changed),
    waiting=st.lists(requests, max_size=12),
    running=st.lists(
        st.builds(runs, deadline_s=st.one_of(st.just(NEVER), st.floats(90, 400))), max_size=4
    ),
    mode=st.integers(0, 2),
    mode_since_s=st.floats(0, 100),
    idle_since_s=st.floats(0, 100),
    link_up=st.booleans(),
    loaded=st.booleans(),
    quiet_until_s=st.floats(0, 300),
    energy_debt_j=st.floats(0, 1e5),
    rest_k=st.floats(-60, 20),
    warming_kw=st.floats(0, 2),
    stalled_share=st.floats(0, 1),
    fastest=st.one_of(st.none(), st.integers(0, 2)),
)


@settings(max_examples=60, deadline=None)
@given(state=states)
def test_whatever_the_state_nothing_private_leaves_and_nothing_is_invented(
    state: PaceState,
) -> None:
    decision = PACE.decide(state, explain=True)
    known = {one.id: one for one in state.waiting}
    assert len(set(decision.start) | set(decision.offload)) == len(decision.start) + len(
        decision.offload
    )
    for name in decision.offload:
        assert known[name].may_leave
        assert state.link_up
    for name in decision.start:
        assert known[name].may_stay
    assert len(decision.start) <= max(0, BOARD.rows - len(state.running))
    assert decision.wake_s > state.now_s
    if state.fastest is not None and (decision.start or state.running):
        assert decision.mode <= state.fastest
    assert {one.id for one in decision.terms} == (set(known) if state.waiting else set())
    assert PACE.decide(state, explain=True) == decision
    plain = PACE.decide(state)
    assert replace(decision, terms=()) == plain


@settings(max_examples=60, deadline=None)
@given(state=states)
def test_without_a_cloud_or_a_link_nothing_leaves(state: PaceState) -> None:
    assert not replace(PACE, cloud=None).decide(state).offload
    assert not PACE.decide(replace(state, link_up=False)).offload


def test_time_enough_takes_the_knee_and_a_near_deadline_a_faster_mode() -> None:
    easy = PACE.decide(state(asks(deadline_s=200.0)))
    assert (easy.mode, easy.start) == (KNEE, ("a",))
    near = PACE.decide(state(asks(deadline_s=103.5)))
    assert (near.mode, near.start) == (FAST, ("a",))


def test_earlier_deadlines_go_first_whoever_came_first() -> None:
    several = [asks(f"r{n}", deadline_s=400.0 - 10 * n, arrived_s=50.0 + n) for n in range(6)]
    assert _begun(state(*several)) == ["r5", "r4", "r3", "r2"]


def test_without_deadlines_work_that_somebody_waits_for_goes_before_background_work() -> None:
    background = [asks(f"b{n}", may_wait=True, arrived_s=50.0 + n) for n in range(3)]
    begun = _begun(state(*background, asks("a", arrived_s=99.0)))
    assert begun[0] == "a"
    assert begun[1:] == ["b0", "b1", "b2"]


def test_who_is_late_already_goes_behind_those_in_time_and_before_those_without_deadlines() -> None:
    endless = [asks(f"b{n}", may_wait=True, arrived_s=50.0 + n) for n in range(2)]
    late = asks("late", deadline_s=99.0, arrived_s=98.0)
    now = state(*endless, late, asks("in time", deadline_s=200.0))
    assert _begun(now)[:2] == ["in time", "late"]
    fast = speed(now, BOARD, PACE.weights, FAST, 1)
    queue = sorted(now.waiting, key=by_deadline)
    ordered, hopeless = hopeful_first(queue, fast, now, PACE.weights)
    assert ([one.id for one in ordered], hopeless) == (["in time", "late", "b0", "b1"], True)


def test_what_cannot_be_in_time_here_leaves_before_the_cloud_is_late_too() -> None:
    crowd = tuple(runs(output_p90=400.0, output_mean=300.0) for _ in range(4))
    spare = asks(deadline_s=112.0, may_leave=True)
    early = PACE.decide(state(spare, running=crowd, fastest=KNEE, mode=KNEE))
    assert early.offload == ()
    assert 100.0 < early.wake_s < 112.0
    late = PACE.decide(state(spare, running=crowd, fastest=KNEE, now_s=early.wake_s + 1e-3))
    assert late.offload == ("a",)
    private = replace(spare, may_leave=False)
    kept = PACE.decide(state(private, running=crowd, fastest=KNEE, now_s=early.wake_s + 1e-3))
    assert kept.offload == ()


def test_the_cheaper_way_is_taken_and_the_price_is_the_owners() -> None:
    one = asks(deadline_s=300.0, may_leave=True)
    assert PACE.decide(state(one)).start == ("a",)
    assert CLOUD.token_price == 1.0
    free = replace(PACE, cloud=replace(CLOUD, token_price=0.0, token_j=0.01))
    assert free.decide(state(one)).offload == ("a",)


def test_debt_of_the_battery_makes_joules_of_the_device_dear() -> None:
    one = asks(deadline_s=300.0, may_leave=True)
    assert PACE.decide(state(one)).offload == ()
    assert PACE.decide(state(one, energy_debt_j=2000.0)).offload == ("a",)


def test_heat_slows_the_device_down_as_far_as_deadlines_allow() -> None:
    hot: dict[str, Any] = {"rest_k": 0.0, "warming_kw": 1.5}
    assert PACE.decide(state(asks(deadline_s=300.0))).mode == KNEE
    assert PACE.decide(state(asks(deadline_s=300.0), **hot)).mode == SLOW
    assert PACE.decide(state(asks(deadline_s=107.0), **hot)).mode == KNEE


def test_a_faster_mode_comes_at_once_and_a_slower_one_after_the_dwell() -> None:
    now = state(asks(deadline_s=103.5), mode=KNEE, mode_since_s=99.9)
    assert PACE.decide(now).mode == FAST
    settled = state(asks(deadline_s=300.0), mode=FAST, mode_since_s=95.0)
    kept = PACE.decide(settled)
    assert kept.mode == FAST
    assert kept.wake_s == pytest.approx(105.0)
    assert PACE.decide(replace(settled, now_s=105.0)).mode == KNEE


def test_heat_does_not_flap_whatever_is_drawn_while_it_is_asked_about() -> None:
    hot: dict[str, Any] = {"rest_k": 0.0, "warming_kw": 1.5}
    busy = runs(deadline_s=400.0)
    cool = PACE.decide(state(running=(busy,), **hot))
    assert cool.mode == SLOW
    slow = state(running=(busy,), mode=SLOW, mode_since_s=95.0, **hot)
    assert PACE.decide(slow).mode == SLOW
    cooled = replace(slow, rest_k=-50.0)
    assert PACE.decide(cooled).mode == SLOW, "the dwell is kept by a rise that no deadline asks for"
    assert PACE.decide(cooled).wake_s == pytest.approx(105.0)
    assert PACE.decide(replace(cooled, now_s=105.0)).mode == KNEE


def test_a_mode_that_is_kept_for_its_dwell_is_left_in_time_for_a_deadline() -> None:
    long = runs(output_mean=30.0, output_p90=40.0, output_most=120.0, deadline_s=105.0)
    kept = PACE.decide(state(running=(long,), mode=KNEE, mode_since_s=99.0))
    assert kept.mode == KNEE
    assert kept.wake_s < 109.0
    assert (
        PACE.decide(state(running=(long,), mode=KNEE, mode_since_s=99.0, now_s=104.0)).mode == FAST
    )


def test_what_would_be_late_here_even_alone_leaves_at_once() -> None:
    hopeless = asks(prompt_tokens=2000, output_p90=400.0, deadline_s=112.0, may_leave=True)
    assert PACE.decide(state(hopeless)).offload == ("a",)


def test_modes_that_step_equally_fast_are_told_apart_by_their_watts() -> None:
    same = replace(BOARD, modes=(SLOW_MODE, replace(SLOW_MODE, name="same", decode_w=5.0)))
    decision = Pace(costs=same).decide(state(asks(deadline_s=150.0), mode=0))
    assert decision.mode == 0


@settings(max_examples=100, deadline=None)
@given(now_s=st.floats(1e5, 1e7), slack_s=st.floats(5, 14))
def test_a_request_that_waits_to_leave_has_left_when_it_is_looked_at_again(
    now_s: float, slack_s: float
) -> None:
    crowd = tuple(runs(output_p90=400.0, output_mean=300.0) for _ in range(4))
    spare = asks(arrived_s=now_s, deadline_s=now_s + slack_s, may_leave=True)
    asked = state(spare, running=crowd, fastest=KNEE, now_s=now_s)
    for _ in range(4):
        decision = PACE.decide(asked)
        if decision.offload:
            return
        assert now_s < decision.wake_s < NEVER
        asked = replace(asked, now_s=decision.wake_s)
    pytest.fail("it was looked at again and again")


def test_nothing_is_kept_back_for_ever_and_the_last_moment_is_known() -> None:
    tight = runs(output_p90=100.0, output_most=100.0, deadline_s=104.0)
    patient = asks(prompt_tokens=1500, arrived_s=100.0)
    kept = PACE.decide(state(patient, running=(tight,), mode=FAST))
    assert kept.start == ()
    assert kept.wake_s <= 100.0 + 3600.0
    old = replace(patient, arrived_s=100.0 - 3600.0)
    assert PACE.decide(state(old, running=(tight,), mode=FAST)).start == ("a",)
    bounded = replace(patient, deadline_s=300.0)
    wakes = PACE.decide(state(bounded, running=(tight,), mode=FAST))
    assert wakes.wake_s < 300.0
    behind = [replace(patient, id=f"l{n}", arrived_s=90.0 + n) for n in range(3)]
    short = asks("short", prompt_tokens=1, output_most=2.0, deadline_s=NEVER, arrived_s=99.0)
    assert PACE.decide(state(*behind, short, running=(tight,), mode=FAST)).start == ("short",)


def test_work_that_may_wait_is_held_while_idle_and_rides_along_otherwise() -> None:
    patient = asks(deadline_s=1000.0, may_wait=True)
    held = PACE.decide(state(patient))
    assert held.start == ()
    assert 100.0 < held.wake_s < 1000.0
    assert PACE.decide(state(patient, now_s=held.wake_s)).start == ("a",)
    assert sorted(_begun(state(patient, asks("b")))) == ["a", "b"]
    assert PACE.decide(state(patient, running=(runs(),))).start == ("a",)
    full = [replace(patient, id=f"p{n}") for n in range(4)]
    assert len(_begun(state(*full))) == 4


def test_quiet_hours_hold_what_may_wait_until_its_deadline_says_otherwise() -> None:
    patient = asks(deadline_s=900.0, may_wait=True)
    others = [replace(patient, id=f"p{n}") for n in range(4)]
    assert PACE.decide(state(*others, quiet_until_s=600.0)).start == ()
    assert PACE.decide(state(*others, quiet_until_s=600.0)).wake_s == pytest.approx(600.0)
    last = PACE.decide(state(patient, quiet_until_s=5000.0))
    assert last.wake_s < 900.0


def test_an_idle_device_is_parked_after_a_while_and_only_once() -> None:
    idle = state(mode=FAST, mode_since_s=0.0, idle_since_s=99.5)
    waits = PACE.decide(idle)
    assert waits.mode == FAST
    assert PACE.decide(replace(idle, now_s=waits.wake_s)).mode == SLOW
    parked = PACE.decide(replace(idle, mode=SLOW))
    assert (parked.mode, parked.wake_s) == (SLOW, NEVER)


def test_a_newcomer_does_not_make_late_what_runs() -> None:
    tight = runs(output_p90=100.0, output_most=100.0, deadline_s=104.0)
    long_prompt = asks(prompt_tokens=1500, deadline_s=300.0)
    assert PACE.decide(state(long_prompt, running=(tight,), mode=FAST)).start == ()
    assert PACE.decide(state(long_prompt, running=(runs(),), mode=FAST)).start == ("a",)
    urgent = replace(long_prompt, deadline_s=104.5)
    assert PACE.decide(state(urgent, running=(tight,), mode=FAST)).start == ("a",)


@settings(max_examples=60, deadline=None)
@given(state=states)
def test_prompts_are_begun_one_at_a_time_and_the_next_is_looked_at_when_one_is_there(
    state: PaceState,
) -> None:
    assert len(PACE.decide(state).start) <= 1
    busy = replace(state, running=(runs(prefill_tokens=50.0), *state.running[:2]))
    decision = PACE.decide(busy)
    assert decision.start == ()
    if any(one.may_stay and not one.may_leave and not one.may_wait for one in state.waiting):
        assert decision.wake_s <= state.now_s + 50 * BOARD.modes[state.mode].prefill_token_s + 0.011


def test_who_is_late_whatever_is_done_goes_behind_those_who_are_not() -> None:
    late = asks("late", deadline_s=100.2, arrived_s=98.0)
    in_time = asks("in time", deadline_s=130.0, arrived_s=99.0)
    assert _begun(state(late, in_time)) == ["in time", "late"]
    starved = replace(late, arrived_s=100.0 - 3600.0)
    assert PACE.decide(state(starved, in_time)).start == ("late",)
    hoped = replace(late, deadline_s=102.5, output_mean=60.0)
    assert PACE.decide(state(hoped, in_time)).start == ("late",)


@settings(max_examples=60, deadline=None)
@given(state=states)
def test_nobody_who_may_be_in_time_waits_for_one_who_cannot(state: PaceState) -> None:
    fast = speed(state, BOARD, PACE.weights, state.fastest or 0, 1)
    queue = sorted(state.waiting, key=by_deadline)
    ordered, hopeless = hopeful_first(queue, fast, state, PACE.weights)
    assert sorted(one.id for one in ordered) == sorted(one.id for one in queue)
    late = [fast.now_s + fast.least(one) > one.deadline_s for one in ordered]
    if all(one.arrived_s > state.now_s - 3600 for one in queue):
        bounded = late[: sum(one.deadline_s < NEVER for one in queue)]
        assert bounded == sorted(bounded)
        assert not any(late[len(bounded) :])
    assert hopeless == any(late)


@settings(max_examples=60, deadline=None)
@given(state=states)
def test_prices_of_a_line_are_those_of_each(state: PaceState) -> None:
    line = [replace(one, may_leave=True) for one in state.waiting]
    fast = speed(state, BOARD, PACE.weights, FAST, 3)
    done_s, late_one = 110.0, False
    for one in line:
        work_s, own_s = fast.of(one)
        done_s += work_s
        late_one = late_one or one.deadline_s < max(done_s, fast.now_s + own_s) - 1e-9
    assert fast.in_time(line, 110.0) != late_one
    here = local_prices(state, BOARD, PACE.weights, KNEE)
    there = cloud_prices(state, PACE.weights, CLOUD, RADIO)
    assert fast.of_all(line) == [pytest.approx(fast.of(one)) for one in line]
    assert here.of_all(line) == [pytest.approx(here.of(one)) for one in line]
    assert there.of_all(line) == [pytest.approx(there.of(one)) for one in line]
    stays = [replace(one, may_leave=False) for one in line]
    assert there.of_all(stays) == [NEVER] * len(line)
    late = [one.id for one in line if fast.now_s + fast.least(one) > one.deadline_s + 1e-9]
    assert [one.id for one in fast.hopeless(line)] == late


def test_work_that_may_wait_begins_beside_others_only_where_they_stay_in_time_as_they_run() -> None:
    patient = asks("patient", prompt_tokens=800, deadline_s=2000.0, may_wait=True)
    others = runs(output_p90=100.0, output_most=140.0, deadline_s=111.0)
    kept = PACE.decide(state(patient, running=(others,)))
    assert (kept.mode, kept.start) == (KNEE, ())
    urgent = replace(patient, may_wait=False)
    assert PACE.decide(state(urgent, running=(others,))).start == ("patient",)
    easy = replace(others, deadline_s=400.0)
    assert PACE.decide(state(patient, running=(easy,))).start == ("patient",)
    hurried = replace(others, deadline_s=105.8)
    faster = PACE.decide(state(patient, running=(hurried,)))
    assert (faster.mode, faster.start) == (FAST, ())
    assert 100.0 < faster.wake_s < 2000.0


def test_work_that_may_wait_leaves_a_row_to_the_next_who_cannot() -> None:
    patient = asks("patient", deadline_s=2000.0, may_wait=True)
    three = [runs(deadline_s=400.0) for _ in range(3)]
    assert PACE.decide(state(patient, running=tuple(three))).start == ()
    assert PACE.decide(state(patient, running=tuple(three[:2]))).start == ("patient",)
    alike = tuple(replace(one, may_wait=True) for one in three)
    assert PACE.decide(state(patient, running=alike)).start == ("patient",)
    urgent = replace(patient, may_wait=False)
    assert PACE.decide(state(urgent, running=tuple(three))).start == ("patient",)


def test_the_terms_say_what_either_way_costs_and_why() -> None:
    private = asks("private", deadline_s=300.0)
    free = asks("free", deadline_s=300.0, may_leave=True)
    terms = {one.id: one for one in PACE.decide(state(private, free), explain=True).terms}
    assert terms["private"].cloud_j == math.inf
    assert terms["private"].route == "edge"
    assert terms["free"].local_j < terms["free"].cloud_j < math.inf
    joules = BOARD.request_j(KNEE, 100, 50.0)
    assert terms["free"].local_j == pytest.approx(joules)


@pytest.mark.parametrize("name", ["energy", "margin_s", "dwell_s"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_weights_that_make_no_sense_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"pace\.{name}"):
        Weights(**{name: value})


def test_a_debt_of_nothing_cannot_double_a_joule() -> None:
    with pytest.raises(ConfigError, match=r"pace\.debt_j = 0"):
        Weights(debt_j=0.0)
