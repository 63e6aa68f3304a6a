"""What work costs: linear, shared by rows, and refused where it makes no sense."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from energyboard import BOARD, SLOW
from hypothesis import given
from hypothesis import strategies as st

from tidegate.edge.energy.cost import CloudCost, CostModel, RadioCost
from tidegate.errors import ConfigError

tokens = st.integers(1, 2000)


@given(prompt=tokens, output=tokens, rows=st.integers(1, 4), mode=st.integers(0, 2))
def test_rows_that_share_steps_share_joules_and_wait_for_each_other(
    prompt: int, output: int, rows: int, mode: int
) -> None:
    alone = BOARD.request_j(mode, prompt, output)
    shared = BOARD.request_j(mode, prompt, output, rows)
    assert shared <= alone * (1 + 1e-9)
    assert BOARD.request_s(mode, prompt, output, rows) >= BOARD.request_s(mode, prompt, output)


@given(prompt=tokens, output=tokens, mode=st.integers(0, 2))
def test_a_request_costs_its_prompt_and_each_of_its_tokens(
    prompt: int, output: int, mode: int
) -> None:
    one = BOARD.modes[mode]
    context = prompt + output / 2
    by_hand = (one.prefill_w - BOARD.idle_w) * (
        one.prefill_start_s
        + prompt * one.prefill_token_s
        + prompt * prompt / 2 * one.prefill_context_s
    ) + sum(
        (one.decode_w - BOARD.idle_w) * (one.step_s + context * one.context_token_s)
        for _ in range(output)
    )
    assert BOARD.request_j(mode, prompt, output) == pytest.approx(by_hand)


def test_the_knee_is_the_mode_of_least_joules_per_token_and_idle_is_the_idlest() -> None:
    joules = [BOARD.token_j(mode) for mode in range(3)]
    assert BOARD.knee == joules.index(min(joules)) == 1
    assert BOARD.idle_w == min(mode.idle_w for mode in BOARD.modes)
    assert BOARD.modes[BOARD.idlest].name == "slow"


@given(cuts=st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_the_chunks_of_a_prompt_take_as_long_as_the_prompt(cuts: list[int]) -> None:
    one = replace(BOARD.modes[1], prefill_context_s=3e-6)
    past = [sum(cuts[:place]) for place in range(len(cuts))]
    chunks = sum(one.chunk_s(*chunk) for chunk in zip(cuts, past, strict=True))
    assert one.prefill_start_s + chunks == pytest.approx(one.prefill_s(sum(cuts)))


def test_a_prompt_starts_anew_with_each_of_its_parts() -> None:
    one = replace(BOARD.modes[1], prefill_context_s=3e-6)
    parted = replace(one, part_tokens=256)
    for tokens, further in ((1, 0), (256, 0), (257, 1), (512, 1), (620, 2)):
        more_s = parted.prefill_s(tokens) - one.prefill_s(tokens)
        assert more_s == pytest.approx(further * one.prefill_start_s)
    with pytest.raises(ConfigError, match=r"cost\.knee\.part_tokens = 0: must be at least 1"):
        replace(BOARD, modes=(replace(one, part_tokens=0),))


def test_where_no_watts_are_known_the_knee_is_the_fastest_mode() -> None:
    blind = [replace(one, prefill_w=0.0, decode_w=0.0, idle_w=0.0) for one in BOARD.modes]
    assert replace(BOARD, modes=tuple(blind)).knee == BOARD.fastest


def test_scaled_power_scales_what_is_above_idle_and_nothing_else() -> None:
    scaled = BOARD.scaled(1.3)
    assert scaled.request_j(1, 100, 50) == pytest.approx(1.3 * BOARD.request_j(1, 100, 50))
    assert scaled.request_s(1, 100, 50) == BOARD.request_s(1, 100, 50)
    assert scaled.idle_w == BOARD.idle_w


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"step_s": 0.0}, r"cost\.slow\.step_s = 0\.0"),
        ({"prefill_token_s": math.nan}, r"cost\.slow\.prefill_token_s"),
        ({"prefill_context_s": -1e-9}, r"cost\.slow\.prefill_context_s"),
        ({"row_s": -1.0}, r"cost\.slow\.row_s"),
        ({"decode_w": 0.5}, r"cost\.slow\.decode_w = 0\.5.*idle mode"),
    ],
)
def test_a_mode_that_makes_no_sense_is_refused_by_name(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(BOARD, modes=(replace(SLOW, **changed),))


def test_a_board_without_modes_or_with_two_of_one_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cost\.modes"):
        CostModel(modes=(), rows=1, scope="board", source="estimated")
    with pytest.raises(ConfigError, match="different names"):
        replace(BOARD, modes=(SLOW, SLOW))
    with pytest.raises(ConfigError, match=r"cost\.rows = 0"):
        replace(BOARD, rows=0)


def test_sending_costs_bytes_and_a_tail_that_is_shared_when_another_follows() -> None:
    radio = RadioCost(up_byte_j=1e-3, down_byte_j=2e-3, tail_w=1.0, tail_s=10.0)
    cloud = CloudCost(
        rtt_s=0.1,
        wait_s=0.2,
        prefill_token_s=1e-3,
        token_s=1e-2,
        token_j=0.3,
        prompt_token_bytes=4,
        token_bytes=5,
        message_bytes=100,
    )
    assert cloud.answer_s(radio, 100, 50) == pytest.approx(0.1 + 0.2 + 0.1 + 0.5)
    whole = cloud.device_j(radio, 100, 50)
    assert whole == pytest.approx(500 * 1e-3 + 350 * 2e-3 + 10.0)
    assert cloud.device_j(radio, 100, 50, tail=0.5) == pytest.approx(whole - 5.0)
