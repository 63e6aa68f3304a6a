"""Fits find the line that is there, never a negative one, and say which points are off it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.edge.energy.calibrate_bench import Part, Sample, quantile, quiet
from tidegate.edge.energy.calibrate_fit import fit_mode, least_squares
from tidegate.edge.energy.calibrate_points import GridPoint, design
from tidegate.edge.energy.cost import ModeCost
from tidegate.errors import ExecutionError

PLAN = design(longest_prompt=900, rows=4)
some = st.floats(1e-7, 1e-1)
maybe = st.one_of(st.just(0.0), some)


def sample(cost: ModeCost, point: GridPoint, stretched: float = 1.0) -> Sample:
    """A run of a point in chunks of 256, on a board of exactly `cost`."""
    starts = range(0, point.prompt_tokens, 256)
    parts = []
    for past in starts:
        tokens = min(256, point.prompt_tokens - past)
        beside = point.rows - 1
        context = beside * (point.prompt_tokens + 5)
        seconds = cost.chunk_s(tokens, past) + cost.prefill_start_s
        if beside:
            seconds += cost.beside_s + (beside - 1) * cost.row_s + context * cost.context_token_s
        parts.append(
            Part(
                tokens=tokens,
                past_tokens=past,
                beside=beside,
                context_tokens=context,
                seconds=seconds * stretched,
            )
        )
    context_tokens = point.rows * (point.prompt_tokens + point.output_tokens / 2)
    return Sample(
        point=point,
        parts=tuple(parts),
        step_s=cost.batch_step_s(point.rows, context_tokens) * stretched,
        context_tokens=context_tokens,
        steps=point.output_tokens - 1,
        whole_s=1.0,
        spread=0.1,
    )


@given(
    start=maybe,
    token=some,
    pair=maybe,
    step=some,
    row=st.floats(0, 1),
    beside=st.floats(0, 1),
    context=maybe,
)
def test_an_exact_board_is_found_exactly(
    start: float,
    token: float,
    pair: float,
    step: float,
    row: float,
    beside: float,
    context: float,
) -> None:
    cost = ModeCost(
        name="m",
        prefill_start_s=start,
        prefill_token_s=token,
        prefill_context_s=pair / 1000,
        step_s=step,
        row_s=row * step,
        beside_s=beside * step,
        context_token_s=context / 1000,
        prefill_w=0,
        decode_w=0,
        idle_w=0,
    )
    fit = fit_mode(
        "m",
        [sample(cost, one) for one in PLAN.fitted],
        [sample(cost, one) for one in PLAN.held],
        part_tokens=256,
    )
    # Rows beside a prompt may be nearly all of its step, which then tells little of the prompt.
    assert fit.decode_error < 1e-3
    beside_s = cost.beside_s + 3 * cost.row_s + 3 * 900 * cost.context_token_s
    if beside_s < 0.2 * cost.prefill_s(8):
        assert fit.prefill_error < 1e-3
        assert not fit.outliers
    assert fit.cost.step_s > 0
    assert fit.cost.row_s <= fit.cost.step_s


REAL = ModeCost(
    name="m",
    prefill_start_s=8e-4,
    prefill_token_s=2e-5,
    prefill_context_s=4e-8,
    step_s=6e-4,
    row_s=5e-5,
    beside_s=2e-4,
    context_token_s=2e-7,
    prefill_w=0,
    decode_w=0,
    idle_w=0,
)


def test_a_few_disturbed_points_are_named_and_do_not_bend_the_others() -> None:
    fitted = [sample(REAL, one, 3.0 if n in (4, 9) else 1.0) for n, one in enumerate(PLAN.fitted)]
    fit = fit_mode("m", fitted, [sample(REAL, one) for one in PLAN.held], part_tokens=256)
    assert fit.prefill_error < 0.02
    assert fit.decode_error < 0.02
    named = {str(PLAN.fitted[n]) for n in (4, 9)}
    assert all(any(point in line for line in fit.outliers) for point in named)
    assert len(fit.outliers) == 4  # their prompts and their answers


def test_rows_that_would_take_longer_than_a_step_of_one_take_as_long() -> None:
    samples = [
        Sample(
            point=one,
            parts=sample(REAL, GridPoint(prompt_tokens=64, output_tokens=8, rows=1)).parts,
            step_s=1e-3 + (one.rows - 1) * 2e-3,
            context_tokens=100.0,
            steps=23,
            whole_s=1.0,
            spread=0.0,
        )
        for one in PLAN.fitted
    ]
    fit = fit_mode("m", samples, samples[:2], part_tokens=256)
    assert fit.cost.row_s == fit.cost.step_s > 1e-3


def test_too_few_points_are_no_calibration() -> None:
    samples = [sample(REAL, one) for one in PLAN.points]
    with pytest.raises(ExecutionError, match=r"2 points were complete: .* more time"):
        fit_mode("m", samples[:2], samples[5:], part_tokens=256)
    with pytest.raises(ExecutionError, match="to compare with"):
        fit_mode("m", samples, [], part_tokens=256)


@given(seed=st.integers(0, 200))
def test_no_coefficient_is_ever_negative(seed: int) -> None:
    draw = np.random.default_rng(seed)
    columns = draw.uniform(0.1, 100, (12, 3))
    found = least_squares(columns, draw.uniform(1e-4, 1, 12), needed={0})
    assert found[0] > 0
    assert min(found) >= 0


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_times_that_are_none_fail_the_calibration(wrong: float) -> None:
    seconds = np.array([1.0, wrong, 1.0])
    with pytest.raises(ExecutionError, match="calibration failed: not all of 3 times"):
        least_squares(np.ones((3, 1)), seconds, needed={0})


def test_times_that_no_costs_explain_fail_the_calibration() -> None:
    with pytest.raises(ExecutionError, match="calibration failed: no costs explain the 3 times"):
        least_squares(-np.ones((3, 1)), np.ones(3), needed={0})


def test_the_low_fifth_is_between_the_nearest_two() -> None:
    assert quiet([5.0]) == 5.0
    assert quiet([6.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert quantile([1.0, 2.0], 0.5) == 1.5
