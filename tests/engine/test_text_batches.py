"""Who goes into an encoder's next batch: everyone once, in turn, with little padding."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.engine.text_batches import (
    BatchLimits,
    CallId,
    TextLine,
    WaitingText,
    batches,
)
from tidegate.errors import CapacityError, ConfigError

LIMITS = BatchLimits(rows=4, tokens=64, most_waiting=200)

some_limits = st.builds(
    BatchLimits,
    rows=st.integers(1, 6),
    tokens=st.integers(1, 300),
    padding_tokens=st.integers(0, 100),
    most_waiting=st.just(500),
)
some_lengths = st.lists(st.integers(1, 120), min_size=1, max_size=20)


def line_of(*calls: list[int], limits: BatchLimits = LIMITS) -> TextLine:
    line = TextLine(limits)
    for number, lengths in enumerate(calls):
        line.add(CallId(number), lengths, now_s=0.0)
    return line


def calls_in(batch: list[WaitingText]) -> list[int]:
    return [text.call for text in batch]


def all_batches(line: TextLine) -> list[list[WaitingText]]:
    found = []
    while batch := line.take():
        found.append(batch)
    return found


@given(st.lists(some_lengths, min_size=1, max_size=8), some_limits)
def test_every_text_goes_once_within_the_limits(
    calls: list[list[int]], limits: BatchLimits
) -> None:
    line = line_of(*calls, limits=limits)
    taken = all_batches(line)
    assert Counter((text.call, text.index) for batch in taken for text in batch) == Counter(
        (number, index) for number, lengths in enumerate(calls) for index in range(len(lengths))
    )
    for batch in taken:
        longest = batch[0].length
        assert longest == max(text.length for text in batch)
        assert len(batch) <= limits.rows
        assert len(batch) == 1 or len(batch) * longest <= limits.tokens
    assert len(line) == 0
    assert line.due_s() is None


@given(st.lists(some_lengths, min_size=1, max_size=8), some_limits)
def test_one_text_more_never_adds_more_padding_than_a_run_is_worth(
    calls: list[list[int]], limits: BatchLimits
) -> None:
    for batch in all_batches(line_of(*calls, limits=limits)):
        lengths = sorted(text.length for text in batch)
        padding = len(lengths) * lengths[-1] - sum(lengths)
        assert padding <= limits.padding_tokens * (len(lengths) - 1)


@given(st.lists(some_lengths, min_size=1, max_size=6), st.lists(some_lengths, max_size=40))
def test_the_first_in_turn_is_always_served_next(
    early: list[list[int]], late: list[list[int]]
) -> None:
    """So however much comes later, a text waits for a bounded number of batches."""
    line = line_of(*early)
    left = {(number, index) for number, one in enumerate(early) for index in range(len(one))}
    bound = len(left) + sum(map(len, early))
    for number, lengths in enumerate(late):
        left -= {(text.call, text.index) for text in line.take()}
        line.add(CallId(100 + number), lengths, now_s=1.0)
    for _ in range(bound + sum(len(lengths) for lengths in late)):
        left -= {(text.call, text.index) for text in line.take()}
    assert not left


def test_a_call_that_comes_while_a_thousand_texts_wait_is_in_the_next_batch() -> None:
    limits = BatchLimits(rows=8, tokens=1000)
    line = line_of([10] * 1000, limits=limits)
    line.take()
    line.add(CallId(1), [10, 11], now_s=0.0)
    assert calls_in(line.take()).count(1) == 2


def test_a_stream_of_small_calls_does_not_keep_a_large_one_waiting() -> None:
    limits = BatchLimits(rows=4, tokens=1000, most_waiting=1000)
    line = line_of([10] * 20, limits=limits)
    taken = 0
    for number in range(1, 30):
        for more in range(4):
            line.add(CallId(number * 10 + more), [10], now_s=0.0)
        taken += calls_in(line.take()).count(0)
    assert taken == 20


def test_texts_of_other_lengths_wait_for_their_like() -> None:
    line = line_of([100], [5], [101], [6], [99], limits=BatchLimits(rows=4, tokens=1000))
    assert calls_in(line.take()) == [2, 0, 4]
    assert calls_in(line.take()) == [3, 1]


def test_who_leaves_gives_the_places_up() -> None:
    line = line_of([5] * 150, [5] * 50)
    with pytest.raises(CapacityError, match="201 texts would be waiting: at most 200 may"):
        line.add(CallId(2), [5], now_s=0.0)
    line.leave(CallId(0))
    line.add(CallId(3), [5] * 150, now_s=0.0)
    assert {call for batch in all_batches(line) for call in calls_in(batch)} == {1, 3}


def test_a_batch_waits_for_others_until_it_is_full_or_its_first_has_waited() -> None:
    line = TextLine(BatchLimits(rows=3, tokens=100, wait_s=0.01))
    assert line.due_s() is None
    line.add(CallId(0), [5], now_s=7.0)
    line.add(CallId(1), [5], now_s=7.005)
    assert line.due_s() == pytest.approx(7.01)
    line.add(CallId(2), [5], now_s=7.006)
    assert line.due_s() == -math.inf
    line.take()
    line.add(CallId(3), [50, 50], now_s=8.0)
    assert line.due_s() == -math.inf


def test_a_call_with_a_deadline_is_not_kept_waiting_and_goes_first_of_its_turn() -> None:
    line = TextLine(BatchLimits(rows=1, tokens=100, wait_s=0.5))
    line.add(CallId(0), [5], now_s=1.0)
    line.add(CallId(1), [5], now_s=1.1, deadline_s=3.0)
    line.add(CallId(2), [5], now_s=1.1, deadline_s=2.0)
    assert [calls_in(batch) for batch in all_batches(line)] == [[2], [1], [0]]
    line.add(CallId(3), [5], now_s=5.0, deadline_s=6.0)
    due_s = line.due_s()
    assert due_s is not None
    assert due_s <= 5.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": 0},
        {"tokens": 0},
        {"wait_s": -0.1},
        {"wait_s": 2.0},
        {"padding_tokens": -1},
        {"most_waiting": 0},
    ],
)
def test_limits_out_of_range_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        BatchLimits(**wrong)


@given(some_lengths, st.integers(1, 6), st.integers(1, 300))
def test_the_texts_of_one_job_go_once_and_the_longest_first(
    lengths: list[int], rows: int, tokens: int
) -> None:
    found = batches(lengths, rows, tokens)
    assert sorted(number for batch in found for number in batch) == list(range(len(lengths)))
    heads = [lengths[batch[0]] for batch in found]
    assert heads == sorted(heads, reverse=True)
    assert all(
        len(batch) == 1 or (len(batch) <= rows and len(batch) * lengths[batch[0]] <= tokens)
        for batch in found
    )
