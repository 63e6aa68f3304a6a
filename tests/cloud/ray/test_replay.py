"""A second run of an answer: what the caller has is compared and not given again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.cloud.ray.replay import DivergedError, Replay

PAYLOADS = st.lists(st.binary(max_size=6), min_size=1, max_size=12)


@given(PAYLOADS, st.lists(st.integers(0, 12), max_size=4))
def test_over_any_number_of_runs_each_payload_is_given_once(
    payloads: list[bytes], cuts: list[int]
) -> None:
    replay, given_out = Replay(), []
    for cut in [*cuts, len(payloads)]:
        replay.begin()
        given_out += [one for one in payloads[:cut] if replay.is_new(one)]
    replay.end()
    assert given_out == payloads
    assert replay.given == len(payloads)


@given(PAYLOADS, st.integers(0, 11), st.integers(0, 11))
def test_another_answer_is_noticed_before_anything_of_it_is_given(
    payloads: list[bytes], place: int, had: int
) -> None:
    had = 1 + had % len(payloads)
    other = list(payloads)
    other[place % had] += b"!"
    replay = Replay()
    replay.begin()
    assert all(replay.is_new(one) for one in payloads[:had])
    replay.begin()
    with pytest.raises(DivergedError):
        assert not any(replay.is_new(one) for one in other)


def test_payloads_that_are_cut_elsewhere_are_another_answer() -> None:
    replay = Replay()
    replay.begin()
    for one in (b"ab", b"c"):
        replay.is_new(one)
    replay.begin()
    replay.is_new(b"a")
    with pytest.raises(DivergedError):
        replay.is_new(b"bc")


def test_a_run_that_ends_sooner_is_another_answer() -> None:
    replay = Replay()
    replay.begin()
    for one in (b"a", b"b"):
        replay.is_new(one)
    replay.begin()
    replay.is_new(b"a")
    with pytest.raises(DivergedError, match="shorter"):
        replay.end()


def test_a_caller_may_try_again() -> None:
    assert DivergedError.retryable
