"""The ledger over hours and steps of minutes: nothing is lost, nothing grows, nothing shrinks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgerboard import Board, prompt, report, token
from sensortrees import COSTS

from tidegate.edge.energy.ledger import TotalKey
from tidegate.engine.request import RequestId

A, B, C = RequestId("a"), RequestId("b"), RequestId("c")
ONLY = COSTS.modes[0]


def test_a_prompt_of_minutes_is_its_requests_and_not_idlings() -> None:
    board, running = Board(), [A]
    board.ledger.working = lambda: bool(running)
    for _ in range(90):
        board.ledger.settle(board.meter.draw(12.0, 1.0))
    board.ledger.stepped(report(board.clock, 90.0, prompt(A, 4000)), 0)
    used = board.ledger.use_of(A)
    assert used is not None
    assert used.source == "measured"
    assert used.joules == pytest.approx(900.0)
    board.ledger.forget(A)
    for _ in range(10):
        board.step(12.0, 1.0, prompt(B, 500))
        board.look()
    used = board.ledger.use_of(B)
    assert used is not None
    assert used.joules == pytest.approx(100.0), "idling is still known to take 2 W"


def test_a_step_that_never_ends_is_waited_for_so_long_and_teaches_no_idling() -> None:
    board, running = Board(), [A]
    board.ledger.working = lambda: bool(running)
    for _ in range(2000):
        board.ledger.settle(board.meter.draw(12.0, 1.0))
    assert board.ledger.open_j == pytest.approx(12.0 * 900, rel=0.01)
    running.clear()
    board.ledger.settle(board.meter.draw(2.0, 1.0))
    assert board.ledger.open_j < 12.0 * 32
    for _ in range(60):
        board.ledger.settle(board.meter.draw(2.0, 1.0))
    board.step(12.0, 1.0, prompt(B, 500))
    board.look()
    used = board.ledger.use_of(B)
    assert used is not None
    assert used.joules == pytest.approx(10.0)


def test_requests_that_are_never_forgotten_do_not_fill_the_memory() -> None:
    board = Board()
    for n in range(5000):
        board.step(12.0, 0.001, prompt(RequestId(str(n)), 1))
    board.look()
    assert board.ledger.use_of(RequestId("0")) is None
    assert board.ledger.use_of(RequestId("4999")) is not None
    board.step(12.0, 0.001, token(RequestId("0")))
    board.look()
    assert board.ledger.use_of(RequestId("0")) is None


def test_a_board_that_nobody_samples_keeps_few_steps_and_says_estimated() -> None:
    board = Board()
    for _ in range(9000):
        board.step(12.0, 0.001, prompt(A, 1))
    board.look()
    used = board.ledger.use_of(A)
    assert used is not None
    assert used.source == "estimated"
    assert used.joules == pytest.approx(9 * 8)


moves = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.floats(0.001, 3.0), st.integers(1, 7)),
        st.tuples(st.just("idle"), st.floats(0.001, 3.0), st.integers(0, 0)),
        st.tuples(st.just("look"), st.floats(0.0, 0.5), st.integers(0, 0)),
        st.tuples(st.just("late"), st.floats(0.01, 3.0), st.integers(1, 7)),
        st.tuples(st.just("tell"), st.floats(0.0, 1.0), st.integers(0, 2)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(moves=moves, watts=st.lists(st.floats(0.0, 30.0), min_size=1, max_size=8))
def test_requests_and_idling_together_took_what_was_drawn(
    moves: list[tuple[str, float, int]], watts: list[float]
) -> None:
    board, begun = Board(), set[RequestId]()
    for n, (move, seconds, which) in enumerate(moves):
        power = watts[n % len(watts)]
        if move in ("step", "late"):
            names = [one for bit, one in enumerate((A, B, C)) if which >> bit & 1]
            shares = [token(one) if one in begun else prompt(one, 50) for one in names]
            begun.update(names)
            if move == "step":
                board.step(power, seconds, *shares)
            else:
                board.ledger.settle(board.meter.draw(power, seconds / 2))
                board.meter.draw(power, seconds / 2)
                board.ledger.stepped(report(board.clock, seconds, *shares), 0)
        elif move == "tell":
            board.ledger.use_of((A, B, C)[which])
        else:
            sample = board.meter.draw(power, seconds)
            if move == "look":
                board.ledger.settle(sample)
    board.look()
    uses = [board.ledger.use_of(one) for one in (A, B, C)]
    totals = board.ledger.totals()
    edge_j = totals.get(("module", "measured", "edge"), 0.0)
    idle_j = totals.get(("module", "measured", "idle"), 0.0)
    # The first sample has none before it, so the 2 J until then are in no window.
    assert edge_j + idle_j + board.ledger.open_j == pytest.approx(board.meter.joules - 2.0)
    assert all(one.source == "measured" for one in uses if one is not None)
    told = sum(one.joules for one in uses if one is not None)
    assert told == pytest.approx(edge_j, abs=1e-6)
    board.ledger.settle(board.meter.draw(2.0, 100.0))
    board.ledger.settle(board.meter.draw(2.0, 100.0))
    totals = board.ledger.totals()
    assert totals.get(("module", "measured", "edge"), 0.0) == pytest.approx(told, abs=1e-6)


@given(moves=moves)
def test_totals_never_shrink(moves: list[tuple[str, float, int]]) -> None:
    board, before = Board(), dict[TotalKey, float]()
    for n, (move, seconds, which) in enumerate(moves):
        if n % 7 == 3:
            board.meter.kind = "estimated" if board.meter.kind == "measured" else "measured"
            board.meter.count += 1
            board.meter.joules = 0.0
        if move in ("step", "late"):
            names = [one for bit, one in enumerate((A, B, C)) if which >> bit & 1]
            board.step(9.0, seconds, *(prompt(one, 5) for one in names))
        else:
            board.ledger.settle(board.meter.draw(3.0, seconds))
        now = dict(board.ledger.totals())
        assert all(now[key] >= joules for key, joules in before.items())
        before = now
