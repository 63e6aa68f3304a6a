"""Costs follow what steps take: lasting changes soon, single outliers hardly, and never too far."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from energyboard import BOARD
from hypothesis import given
from hypothesis import strategies as st

from tidegate.edge.energy.corrections import OnlineCosts, Periods, predicted_s
from tidegate.edge.energy.cost import CostModel, ModeCost
from tidegate.engine.request import RequestId
from tidegate.engine.steps import StepReport, StepShare

CALIBRATED = replace(
    BOARD,
    source="calibrated",
    modes=tuple(replace(one, prefill_context_s=2e-6, part_tokens=256) for one in BOARD.modes),
)


def decoding(name: str, past: int, sampled: int = 1) -> StepShare:
    """A row that goes on with its answer."""
    return StepShare(
        request_id=RequestId(name),
        computed_tokens=1,
        past_tokens=past,
        is_prompt=False,
        sampled_tokens=sampled,
    )


def chunk(name: str, past: int, tokens: int, *, last: bool) -> StepShare:
    """A part of a prompt."""
    return StepShare(
        request_id=RequestId(name),
        computed_tokens=tokens,
        past_tokens=past,
        is_prompt=True,
        sampled_tokens=int(last),
    )


def reports(seconds: Iterable[float], *shares: StepShare) -> list[StepReport]:
    """The same step again and again, without a pause."""
    found, now_s = [], 100.0
    for one in seconds:
        now_s += one
        found.append(StepReport(ended_s=now_s, elapsed_s=one, shares=shares))
    return found


def step_s(costs: CostModel, mode: int = 1) -> float:
    """Of one row at 50 tokens."""
    return costs.modes[mode].batch_step_s(1, 51)


def fed(online: OnlineCosts, ratios: Sequence[float], mode: int = 1) -> OnlineCosts:
    """`online` after steps of one row that took `ratios` times what the board costs."""
    took = [ratio * step_s(CALIBRATED, mode) for ratio in ratios]
    for report in reports(took, decoding("one", 50)):
        online.observe(report, mode)
    return online


@given(ratio=st.floats(0.3, 3.5), mode=st.integers(0, 2))
def test_a_lasting_change_is_followed_and_only_approached(ratio: float, mode: int) -> None:
    online, before = OnlineCosts(CALIBRATED), abs(math.log(ratio))
    for report in reports([ratio * step_s(CALIBRATED, mode)] * 150, decoding("one", 50)):
        online.observe(report, mode)
        now = math.log(step_s(online.costs, mode) / (ratio * step_s(CALIBRATED, mode)))
        assert abs(now) <= before + 0.011  # a per cent is what a new model is made for
        assert abs(now) < 0.02 or now * math.log(ratio) < 0, "it never overshoots"
        before = abs(now)
    assert step_s(online.costs, mode) == pytest.approx(ratio * step_s(CALIBRATED, mode), rel=0.02)


def test_exact_costs_are_left_as_they_are() -> None:
    online = fed(OnlineCosts(CALIBRATED), [1.0] * 50)
    assert online.costs is CALIBRATED
    assert online.errors() == {"step": pytest.approx(0.0), "prompt": None}


def test_an_outlier_moves_little() -> None:
    online = fed(OnlineCosts(CALIBRATED), [1.0] * 20 + [1000.0])
    assert 1.0 < step_s(online.costs) / step_s(CALIBRATED) < 1.05


@given(seed=st.integers(0, 999))
def test_noise_does_not_make_costs_swing(seed: int) -> None:
    draw = random.Random(seed)
    online = fed(OnlineCosts(CALIBRATED), [draw.lognormvariate(0.0, 0.3) for _ in range(300)])
    # The factor's logarithm scatters by 0.3 * sqrt(0.1 / 1.9) = 0.07: this is five times as much.
    assert abs(math.log(step_s(online.costs) / step_s(CALIBRATED))) < 0.35


@given(ratio=st.sampled_from((1e-6, 0.01, 50.0, 1e6)))
def test_what_was_fitted_here_is_corrected_by_eight_times_at_most(ratio: float) -> None:
    online = fed(OnlineCosts(CALIBRATED), [ratio] * 400)
    wanted = 8.0 if ratio > 1 else 1 / 8
    assert step_s(online.costs) == pytest.approx(wanted * step_s(CALIBRATED), rel=0.01)


def test_a_guess_is_replaced_by_the_first_few_steps() -> None:
    guessed = replace(CALIBRATED, source="estimated")
    online = fed(OnlineCosts(guessed), [30.0, 900.0, 30.0, 31.0, 29.0])
    assert step_s(online.costs) == pytest.approx(30 * step_s(CALIBRATED), rel=0.01)


def test_what_slows_one_mode_slows_the_others_and_their_order_stays() -> None:
    online = fed(OnlineCosts(CALIBRATED), [2.0] * 200, mode=2)
    steps_s = [step_s(online.costs, mode) for mode in range(3)]
    assert steps_s[2] == pytest.approx(2 * step_s(CALIBRATED, 2), rel=0.02)
    assert steps_s[1] > 1.6 * step_s(CALIBRATED, 1)
    assert steps_s == sorted(steps_s, reverse=True)
    stuck = fed(OnlineCosts(CALIBRATED), [3.9] * 400, mode=2)  # as fast as the slower ones
    steps_s = [step_s(stuck.costs, mode) for mode in range(3)]
    assert steps_s == sorted(steps_s, reverse=True)


def test_a_prompt_is_judged_as_a_whole_when_its_last_part_is_there() -> None:
    online = OnlineCosts(CALIBRATED)
    cost = CALIBRATED.modes[1]
    now_s = 10.0
    for number in range(60):
        for past, tokens in ((0, 256), (256, 256), (512, 100)):
            took_s = 1.5 * (cost.prefill_start_s + cost.chunk_s(tokens, past))
            now_s += took_s
            part = chunk(f"prompt {number}", past, tokens, last=past == 512)
            online.observe(StepReport(ended_s=now_s, elapsed_s=took_s, shares=(part,)), 1)
    ratio = online.costs.modes[1].prefill_s(612) / cost.prefill_s(612)
    assert ratio == pytest.approx(1.5, rel=0.02)
    assert step_s(online.costs) == step_s(CALIBRATED)
    error = online.errors()["prompt"]
    assert error is not None
    assert error < 0.1


@pytest.mark.parametrize("by", [1.0, 1.4])
def test_prompts_and_answers_that_share_steps_are_told_apart(by: float) -> None:
    online = OnlineCosts(CALIBRATED)
    now_s = 0.0
    for number in range(80):
        shares = (decoding("long", 400), chunk(str(number), 0, 200, last=True))
        both = predicted_s(CALIBRATED.modes[0], StepReport(ended_s=0, elapsed_s=0, shares=shares))
        took_s = by * sum(both)
        now_s += took_s
        online.observe(StepReport(ended_s=now_s, elapsed_s=took_s, shares=shares), 0)
    ratio = online.costs.modes[0].prefill_s(200) / CALIBRATED.modes[0].prefill_s(200)
    assert ratio == pytest.approx(by, rel=0.1)


def test_a_step_that_gave_several_tokens_is_several_predicted_ones() -> None:
    cost: ModeCost = CALIBRATED.modes[2]
    shares = (decoding("lucky", 100, sampled=4), decoding("not", 50, sampled=2))
    _, decode_s = predicted_s(cost, StepReport(ended_s=0, elapsed_s=0, shares=shares))
    assert decode_s == pytest.approx(3 * cost.batch_step_s(2, 152))


def test_steps_that_failed_and_clocks_that_stand_still_teach_nothing() -> None:
    online = OnlineCosts(CALIBRATED)
    for report in reports([9.0] * 10, decoding("one", 50, sampled=0)):
        online.observe(report, 0)
    for report in reports([0.0] * 10, decoding("one", 50)):
        online.observe(report, 0)
    assert online.costs is CALIBRATED
    assert online.errors() == {"step": None, "prompt": None}


def test_prompts_that_never_end_are_forgotten() -> None:
    online = OnlineCosts(CALIBRATED)
    for number in range(1000):
        part = chunk(str(number), 0, 10, last=False)
        online.observe(StepReport(ended_s=number, elapsed_s=0.1, shares=(part,)), 0)
    assert len(online._prompts) <= 256


def test_a_pause_between_requests_is_nobodys_and_one_between_steps_is_theirs() -> None:
    periods = Periods()
    first = StepReport(ended_s=10.0, elapsed_s=0.5, shares=(decoding("a", 1),))
    went_on = StepReport(ended_s=10.8, elapsed_s=0.5, shares=(decoding("a", 2), decoding("b", 1)))
    another = StepReport(ended_s=20.0, elapsed_s=0.5, shares=(decoding("c", 1),))
    assert [periods.of(one) for one in (first, went_on, another)] == [
        0.5,
        pytest.approx(0.8),
        0.5,
    ]


def test_steps_around_a_change_of_modes_are_no_part_of_the_next_ones_time() -> None:
    online = fed(OnlineCosts(CALIBRATED), [1.0] * 20)
    long = reports([step_s(CALIBRATED)] * 60, decoding("one", 50))
    for report in long[20:59]:  # on with the same request, in no one mode
        online.passed(report)
    online.observe(long[59], 1)
    assert online.costs is CALIBRATED
    assert online.errors()["step"] == pytest.approx(0.0)
    assert max(online._decode._errors) < 0.01
