"""A calibration finds the board that is there, through the real engine, and says how well."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from energyboard import BOARD
from hypothesis import given
from hypothesis import strategies as st
from timedboard import TimedBoard
from toytext import toy_text

from tidegate.edge.energy.calibrate import LEAST_ROUNDS, Calibrated, Calibration
from tidegate.edge.energy.calibrate_bench import open_bench
from tidegate.edge.energy.calibrate_points import design, longest_prompt
from tidegate.edge.energy.cost import CostModel, ModeCost
from tidegate.errors import ConfigError

SECONDS = (
    *("prefill_start_s", "prefill_token_s", "prefill_context_s"),
    *("step_s", "row_s", "context_token_s", "beside_s"),
)
TRUE = replace(
    BOARD,
    rows=2,
    modes=tuple(
        replace(
            one,
            prefill_context_s=1e-5 * (3 - place),
            beside_s=0.02 / (1 + place),
            part_tokens=128,
        )
        for place, one in enumerate(BOARD.modes[1:])
    ),
)


def calibrated(
    board: TimedBoard,
    *,
    minutes: float = 4,
    modes: Sequence[str] | None = None,
    panel: bool = False,
    progress: list[int] | None = None,
) -> Calibrated:
    """What a calibration finds."""
    reports = progress if progress is not None else []

    async def run() -> Calibrated:
        text = toy_text()
        async with open_bench(board, text, clock=board.clock) as bench:
            return await Calibration(
                bench=bench,
                switch=board,
                panel=board if panel else None,
                modes=board.modes if modes is None else tuple(modes),
                minutes=minutes,
                report=lambda what, done, total: reports.append(done),
                sleep=board.idle,
            ).run()

    return asyncio.run(run())


def assert_found(found: Calibrated, true: CostModel, *, within: float) -> None:
    for fit, mode in zip(found.fits, true.modes, strict=True):
        for name in SECONDS:
            assert getattr(fit.cost, name) == pytest.approx(getattr(mode, name), rel=within), name
        assert fit.cost.part_tokens == mode.part_tokens


def test_every_mode_of_a_board_is_found_with_its_watts() -> None:
    board = TimedBoard(costs=TRUE)
    progress: list[int] = []
    found = calibrated(board, panel=True, minutes=10, progress=progress)
    assert_found(found, TRUE, within=0.01)
    assert found.scope == "module"
    assert "were measured" in found.watts_why
    for fit, mode in zip(found.fits, TRUE.modes, strict=True):
        assert fit.cost.idle_w == pytest.approx(mode.idle_w)
        assert fit.cost.decode_w == pytest.approx(mode.decode_w, rel=0.02)
        assert fit.cost.prefill_w == pytest.approx(mode.prefill_w, rel=0.02)
        assert min(fit.prefill_r2, fit.decode_r2) > 0.999
        assert max(fit.prefill_error, fit.decode_error) < 1e-3
        assert not fit.outliers
    assert found.switch_s == pytest.approx(TRUE.switch_s)
    assert progress == sorted(progress)
    assert progress[-1] == 100


def test_whole_requests_are_compared_with_runs_as_they_were() -> None:
    one = replace(TRUE, modes=TRUE.modes[:1])
    (exact,) = calibrated(TimedBoard(costs=one)).fits
    assert len(exact.whole) == len(exact.decode)
    assert exact.whole_error < 0.01
    for whole, prompt, answer in zip(exact.whole, exact.prefill, exact.decode, strict=True):
        assert prompt.measured_s < whole.measured_s <= prompt.measured_s + answer.measured_s
    (disturbed,) = calibrated(TimedBoard(costs=one, disturbed=0.33), minutes=15).fits
    assert min(one.error for one in disturbed.whole) < -0.3  # each holds many disturbed steps
    assert disturbed.decode_error < 0.05


def test_what_takes_much_longer_than_asked_for_is_refused_with_what_it_takes() -> None:
    board = TimedBoard(costs=replace(TRUE, modes=TRUE.modes[:1]))
    with pytest.raises(ConfigError, match=r"minutes = 2: must be at least \d+, which 5 ro") as told:
        calibrated(board, minutes=2)
    spent_s = board.clock()
    least = int(str(told.value).split("at least ")[1].split(",")[0])
    assert spent_s < 120
    began_s = board.clock()
    assert calibrated(board, minutes=least).rounds >= LEAST_ROUNDS
    assert board.clock() - began_s < 1.5 * 60 * least


def test_other_programs_that_stretch_every_third_step_do_not_bend_the_fit() -> None:
    one = replace(TRUE, modes=TRUE.modes[:1])
    found = calibrated(TimedBoard(costs=one, disturbed=0.33), minutes=15)
    cost, true = found.fits[0].cost, one.modes[0]
    for tokens in (20, 100, 400):
        assert cost.prefill_s(tokens) == pytest.approx(true.prefill_s(tokens), rel=0.05)
        for rows in (1, 2):
            wanted_s = true.batch_step_s(rows, rows * tokens)
            assert cost.batch_step_s(rows, rows * tokens) == pytest.approx(wanted_s, rel=0.05)
    assert found.spread > 1


def test_without_a_sensor_watts_stay_unknown_and_say_why() -> None:
    one = replace(TRUE, modes=TRUE.modes[:1])
    found = calibrated(TimedBoard(costs=one, kind="estimated"), panel=True, minutes=6)
    assert found.scope is None
    assert found.watts_why == "watts are unknown: no sensor: no rail can be read"
    (mode,) = found.fitted_modes("here")
    assert (mode.idle_w, mode.prefill_w, mode.decode_w) == (None, None, None)
    assert found.switch_s is None


def test_some_of_the_modes_are_enough() -> None:
    board = TimedBoard(costs=TRUE)
    found = calibrated(board, modes=[TRUE.modes[1].name])
    assert [fit.cost.name for fit in found.fits] == [TRUE.modes[1].name]
    assert set(board.switched) == {TRUE.modes[1].name}


@pytest.mark.parametrize("modes", [["turbo"], []])
def test_a_mode_that_is_not_there_is_refused_with_those_that_are(modes: list[str]) -> None:
    with pytest.raises(ConfigError, match="knee, fast"):
        calibrated(TimedBoard(costs=TRUE), modes=modes)


def test_a_context_in_which_nothing_could_be_told_apart_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"calibrate\.context = \d+: must be at least 64"):
        calibrated(TimedBoard(costs=TRUE, context_tokens=128))


def test_prompts_are_shorter_where_time_is_short_and_rounds_are_never_too_few() -> None:
    one = replace(TRUE, modes=TRUE.modes[:1])
    found = calibrated(TimedBoard(costs=one), minutes=4)
    assert found.rounds >= LEAST_ROUNDS
    assert found.longest_prompt < found.wanted_prompt
    assert_found(found, one, within=0.01)


@given(context=st.integers(200, 9000), rows=st.integers(1, 16))
def test_points_fit_into_the_context_and_those_held_out_are_not_fitted(
    context: int, rows: int
) -> None:
    longest = longest_prompt(context, rows)
    if longest < 64:
        return
    plan = design(longest_prompt=longest, rows=rows)
    assert not set(plan.fitted) & set(plan.held)
    assert {one.rows for one in plan.fitted} >= {1, rows}
    assert all(1 <= one.rows <= rows for one in plan.points)
    assert all(one.prompt_tokens + one.output_tokens <= context for one in plan.points)
    assert len({one.prompt_tokens for one in plan.fitted}) >= 5


def test_a_mode_of_no_context_cost_is_fitted_with_none() -> None:
    flat: ModeCost = replace(TRUE.modes[0], context_token_s=0.0, prefill_context_s=0.0)
    found = calibrated(TimedBoard(costs=replace(TRUE, modes=(flat,))))
    cost = found.fits[0].cost
    assert cost.context_token_s == pytest.approx(0.0, abs=1e-9)
    assert cost.prefill_context_s == pytest.approx(0.0, abs=1e-9)
    assert cost.step_s == pytest.approx(flat.step_s, rel=1e-3)
