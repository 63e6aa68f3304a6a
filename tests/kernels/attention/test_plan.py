"""How calls of attention are cut into programs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.kernels.attention.plan import (
    SEGMENT,
    SHORT,
    Shape,
    between_floats,
    ordered_tile,
    plan_decode,
    plan_in_order,
    workspace_floats,
)
from tidegate.kernels.launch import Gpu

H200 = Gpu(name="NVIDIA H200", processors=132)
QWEN3_8B = Shape(heads=32, kv_heads=8, head_size=128, query_bytes=2, kv_bytes=2)


def test_one_long_request_is_spread_over_the_whole_gpu() -> None:
    plan = plan_decode(QWEN3_8B, H200, requests=1, most_length=131072, most_tokens=1)
    assert plan.segments * QWEN3_8B.kv_heads == 4 * H200.processors


def test_many_requests_need_no_segments() -> None:
    plan = plan_decode(QWEN3_8B, H200, requests=128, most_length=131072, most_tokens=1)
    assert plan.segments == 1
    assert between_floats(QWEN3_8B, plan, 128) == 0


def test_a_short_request_is_not_cut_into_crumbs() -> None:
    plan = plan_decode(QWEN3_8B, H200, requests=1, most_length=300, most_tokens=1)
    assert plan.segments == 3


@given(
    share=st.integers(1, 128),
    kv_heads=st.integers(1, 8),
    requests=st.integers(1, 40),
    most_tokens=st.integers(1, 20),
    most_length=st.integers(1, 10_000),
    deterministic=st.booleans(),
)
def test_tiles_cover_all_short_requests_and_a_workspace_of_the_limits_is_enough(
    share: int,
    kv_heads: int,
    requests: int,
    most_tokens: int,
    most_length: int,
    deterministic: bool,
) -> None:
    shape = replace(QWEN3_8B, heads=share * kv_heads, kv_heads=kv_heads)
    plan = plan_decode(
        shape, H200, requests=requests, most_tokens=most_tokens, most_length=most_length
    )
    ordered = plan_in_order(
        shape, H200, requests=requests, most_tokens=most_tokens, most_length=most_length
    )
    assert plan.tile_tokens * share <= plan.tile.rows
    assert plan.tiles * plan.tile_tokens >= min(most_tokens, SHORT)
    limit = workspace_floats(
        shape, H200, most_requests=40, most_length=10_000, deterministic=deterministic
    )
    needed = ordered.floats if deterministic else between_floats(shape, plan, requests)
    assert needed <= limit


@pytest.mark.parametrize("requests", [1, 40])
@pytest.mark.parametrize("most_tokens", [1, 5, 300])
@pytest.mark.parametrize("most_length", [300, 5000])
def test_deterministic_tiles_do_not_depend_on_the_step(
    requests: int, most_tokens: int, most_length: int
) -> None:
    plan = plan_in_order(
        QWEN3_8B, H200, requests=requests, most_tokens=most_tokens, most_length=most_length
    )
    assert plan.tile == ordered_tile(QWEN3_8B, H200)
    assert SEGMENT % plan.tile.keys == 0
