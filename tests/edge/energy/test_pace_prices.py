"""What PACE computes in products is what the cost model says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from energyboard import BOARD
from hypothesis import given
from hypothesis import strategies as st

from tidegate.edge.energy.pace_prices import local_prices, speed
from tidegate.edge.energy.pace_state import PaceState, Running, Waiting, Weights

COSTS = replace(
    BOARD,
    modes=tuple(replace(one, prefill_context_s=2e-6, part_tokens=256) for one in BOARD.modes),
)
STATE = PaceState(now_s=0.0, mode=1, mode_since_s=0.0, waiting=(), running=())
tokens = st.integers(1, 2000)


def waiting(prompt: int, output: int) -> Waiting:
    """A request whose answer has `output` tokens for certain."""
    return Waiting(
        id="one",
        prompt_tokens=prompt,
        output_mean=output,
        output_p90=output,
        output_most=output,
        arrived_s=0.0,
    )


@given(prompt=tokens, output=tokens, mode=st.integers(0, 2))
def test_a_request_alone_takes_what_the_model_says(prompt: int, output: int, mode: int) -> None:
    one = waiting(prompt, output)
    pace = speed(STATE, COSTS, Weights(), mode, 1)
    told_s = COSTS.request_s(mode, prompt, output)
    assert pace.of(one) == pytest.approx((told_s, told_s))
    assert pace.longest(one) == pytest.approx(told_s)
    prices = local_prices(STATE, COSTS, Weights(), mode)
    assert prices.of(one) == pytest.approx(COSTS.request_j(mode, prompt, output))
    assert prices.of_all([one]) == pytest.approx([prices.of(one)])
    assert pace.of_all([one]) == [pytest.approx(pace.of(one))]


@given(prompt=tokens, share=st.floats(0, 1), output=tokens)
def test_what_is_left_of_a_prompt_is_its_end(prompt: int, share: float, output: int) -> None:
    left = prompt * share
    run = Running(
        prefill_tokens=left,
        output_mean=output,
        output_p90=output,
        output_most=output,
        context_tokens=prompt,
    )
    pace = speed(STATE, COSTS, Weights(), 1, 1)
    cost = COSTS.modes[1]
    starts_s = cost.prefill_start_s * cost.further_parts(left)
    assert pace.rest_s(run) == pytest.approx(starts_s + cost.chunk_s(left, prompt - left))
