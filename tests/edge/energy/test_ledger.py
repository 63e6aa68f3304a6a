"""The ledger: every joule drawn is somebody's or idling's, and measured means all of it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ledgerboard import Board, Heard, Meter, prompt, report, token
from sensortrees import COSTS, UNKNOWN
from toyexecutor import VirtualClock

from tidegate.edge.energy.ledger import EnergyLedger
from tidegate.edge.energy.ledger_split import split
from tidegate.edge.energy.ledger_windows import IdleWatts
from tidegate.engine.request import RequestId
from tidegate.engine.steps import StepReport

A, B, C = RequestId("a"), RequestId("b"), RequestId("c")
ONLY = COSTS.modes[0]


def test_a_request_alone_takes_all_that_was_drawn_above_idling() -> None:
    board = Board()
    board.step(12.0, 0.5, prompt(A, 500))
    for _ in range(10):
        board.step(7.0, 0.05, token(A))
    assert board.ledger.unsettled(A)
    board.look()
    assert not board.ledger.unsettled(A)
    used = board.ledger.use_of(A)
    assert used is not None
    assert (used.source, used.scope) == ("measured", "module")
    assert used.joules == pytest.approx(10.0 * 0.5 + 5.0 * 0.5)


def test_concurrent_requests_share_a_step_by_what_their_tokens_take() -> None:
    board = Board()
    board.step(10.0, 1.0, prompt(A, 300), token(B, past=1000), token(C, past=0))
    board.look()
    board.ledger.stepped(report(board.clock, 0.0), 0)
    prompt_j = 300 * 0.001 * (10 - 2)
    shared_s = (0.02 + 0.004) / 2
    long_j, short_j = (shared_s + 1000 * 1e-5) * (8 - 2), shared_s * (8 - 2)
    all_j = prompt_j + long_j + short_j
    used = board.ledger.use_of(A)
    assert used is not None
    assert used.joules == pytest.approx(8.0 * prompt_j / all_j)
    # B and C began before what the ledger saw, so nothing is told of them.
    assert board.ledger.use_of(B) is None
    shares = {one.request_id: one for one in split(_mixed(board.clock), COSTS, 0)}
    assert shares[B].weight / shares[C].weight == pytest.approx(long_j / short_j)
    assert sum(one.seconds for one in shares.values()) == pytest.approx(1.0)


def _mixed(clock: VirtualClock) -> StepReport:
    return report(clock, 1.0, prompt(A, 300), token(B, past=1000), token(C, past=0))


def test_a_request_is_measured_only_if_all_of_it_was() -> None:
    board = Board()
    board.step(12.0, 0.5, prompt(A, 500))
    board.look()
    board.meter.kind, board.meter.count, board.meter.joules = "estimated", 1, 0.0
    board.step(7.0, 0.5, token(A))
    board.look()
    board.meter.kind, board.meter.count, board.meter.joules = "measured", 2, 0.0
    board.step(7.0, 0.5, token(A), prompt(B, 10))
    board.look()
    board.step(7.0, 0.5, token(A), token(B))
    board.look()
    used = board.ledger.use_of(A)
    assert used is not None
    assert (used.source, used.scope) == ("estimated", "module")
    whole_j = 0.5 * 8 + 0.5 * 6
    both = split(report(board.clock, 0.5, token(A), prompt(B, 10)), COSTS, 0)
    whole_j += both[0].joules + 0.25 * 6
    assert used.joules == pytest.approx(whole_j)


def test_a_request_that_was_begun_before_a_change_of_the_count_is_told_from_the_costs() -> None:
    board = Board()
    board.step(12.0, 0.5, prompt(A, 500))
    board.meter.count, board.meter.joules = 1, 0.0
    board.look()
    board.step(12.0, 0.5, token(A))
    board.look()
    used = board.ledger.use_of(A)
    assert used is not None
    assert used.source == "estimated"


def test_a_request_measured_at_two_scopes_is_no_sum_of_them() -> None:
    board = Board()
    board.step(12.0, 0.5, prompt(A, 500))
    board.look()
    board.meter.scope, board.meter.count = "wall", 1
    board.look()
    board.clock.advance(0.0)
    for _ in range(3):
        board.ledger.settle(board.meter.draw(2.0, 1.0))
    board.step(7.0, 0.5, token(A))
    board.look()
    used = board.ledger.use_of(A)
    assert used is not None
    assert used.source == "estimated"
    assert used.joules == pytest.approx(0.5 * 8 + 0.5 * 6)


def test_what_idling_takes_is_seen_and_not_assumed() -> None:
    """A sensor of another scope than the costs': their idle watts say nothing of it."""
    board = Board(scope="package")
    board.step(5.0, 1.0, prompt(A, 500))
    board.look()
    used = board.ledger.use_of(A)
    assert used is not None
    assert (used.source, used.scope) == ("measured", "package")
    assert used.joules == pytest.approx(3.0)


def test_before_idling_was_seen_no_request_is_measured() -> None:
    clock = VirtualClock()
    meter = Meter(clock)
    ledger = EnergyLedger(COSTS, Heard(), clock)
    ledger.settle(meter.draw(2.0, 1.0))
    clock.advance(0.5)
    meter.joules += 5.0
    ledger.stepped(report(clock, 0.5, prompt(A, 500)), 0)
    ledger.settle(meter.look())
    used = ledger.use_of(A)
    assert used is not None
    assert used.source == "estimated"


def test_steps_far_shorter_than_a_millisecond_are_missed_as_well() -> None:
    board = Board()
    board.meter.kind, board.meter.count = "estimated", 1
    board.step(12.0, 0.0004, prompt(A, 500))
    board.look()
    board.meter.kind, board.meter.count = "measured", 2
    board.look()
    for _ in range(3):
        board.ledger.settle(board.meter.draw(2.0, 1.0))
    board.step(12.0, 0.5, token(A))
    board.look()
    used = board.ledger.use_of(A)
    assert used is not None
    assert used.source == "estimated"


def test_costs_without_watts_predict_none_and_do_not_keep_a_sensor_from_measuring() -> None:
    board = Board(costs=UNKNOWN, scope="package")
    board.step(6.0, 1.0, prompt(A, 500), prompt(B, 1500))
    board.look()
    for request, joules in ((A, 1.0), (B, 3.0)):
        used = board.ledger.use_of(request)
        assert used is not None
        assert used.joules == pytest.approx(joules)
    assert {scope for scope, _, _ in board.ledger.totals()} == {"package"}
    board.meter.kind, board.meter.count = "estimated", 1
    board.step(6.0, 1.0, prompt(C, 500))
    board.look()
    assert board.ledger.use_of(C) is None


def test_a_step_that_is_reported_after_later_samples_still_gets_its_joules() -> None:
    board = Board()
    for _ in range(4):
        board.ledger.settle(board.meter.draw(12.0, 1.0))
    board.ledger.stepped(report(board.clock, 4.0, prompt(A, 4000)), 0)
    used = board.ledger.use_of(A)
    assert used is not None
    assert used.source == "measured"
    assert used.joules == pytest.approx(40.0)


def test_the_step_in_flight_while_another_request_is_told_stays_measured() -> None:
    board = Board()
    board.step(12.0, 0.5, prompt(A, 500))
    board.ledger.settle(board.meter.draw(12.0, 0.01))
    first = board.ledger.use_of(A)
    board.step(12.0, 0.49, prompt(B, 500))
    # The step began when the other one ended, before the sample in between.
    board.ledger.forget(A)
    clock = board.clock
    board.ledger.stepped(report(clock, 0.0), 0)
    board.look()
    second = board.ledger.use_of(B)
    assert first is not None
    assert second is not None
    assert (first.source, second.source) == ("measured", "measured")
    assert first.joules == pytest.approx(5.0)


def test_a_step_counts_in_each_window_by_how_much_of_it_lies_there() -> None:
    board = Board()
    board.ledger.settle(board.meter.draw(12.0, 1.0))
    board.meter.draw(12.0, 1.0)
    board.ledger.stepped(report(board.clock, 2.0, prompt(A, 50)), 0)
    board.step(32.0, 1.0, prompt(B, 50))
    board.look()
    # The second window has a second of each: 10 J and 30 J above idling, divided evenly.
    for request, joules in ((A, 10.0 + 20.0), (B, 20.0)):
        used = board.ledger.use_of(request)
        assert used is not None
        assert used.joules == pytest.approx(joules)


def test_what_no_sample_came_after_is_not_measured_yet() -> None:
    board = Board()
    board.step(12.0, 0.5, prompt(A, 500))
    board.look()
    board.step(12.0, 0.5, token(A))
    used = board.ledger.use_of(A)
    assert used is not None
    assert used.source == "estimated"
    assert used.joules == pytest.approx(0.5 * 8 + 0.5 * 6)
    board.look()
    used = board.ledger.use_of(A)
    assert used is not None
    assert used.source == "measured"
    assert used.joules == pytest.approx(10.0)


def test_idle_watts_are_a_mean_over_time_of_which_the_last_minutes_count_most() -> None:
    idle = IdleWatts()
    assert idle.of("package") is None
    for watts, seconds in ((2.0, 10.0), (4.0, 5.0), (4.0, 5.0)):
        idle.seen("package", watts, seconds)
    assert idle.of("package") == pytest.approx(3.0)
    for _ in range(900):
        idle.seen("package", 7.0, 1.0)
    assert idle.of("package") == pytest.approx(7.0, abs=0.3)
    assert idle.of("module") is None


def test_calibrated_costs_are_told_as_such() -> None:
    board = Board(costs=replace(COSTS, source="calibrated"))
    board.meter.kind, board.meter.count = "estimated", 1
    board.step(12.0, 0.5, prompt(A, 500))
    board.look()
    used = board.ledger.use_of(A)
    assert used is not None
    assert used.source == "calibrated"
    assert used.joules == pytest.approx(4.0)


def test_what_is_sent_away_is_the_radio_s_and_estimated() -> None:
    board = Board()
    board.ledger.sent(A, 3.0)
    used = board.ledger.use_of(A)
    assert used is not None
    assert (used.joules, used.scope, used.source) == (3.0, "radio", "estimated")
    assert board.ledger.totals()["radio", "estimated", "cloud"] == 3.0
    board.step(12.0, 0.5, prompt(A, 500))
    board.look()
    used = board.ledger.use_of(A)
    assert used is not None
    assert used.scope == "module"
    assert used.joules == pytest.approx(5.0)


def test_nothing_is_told_of_who_is_unknown_or_forgotten() -> None:
    board = Board()
    assert board.ledger.use_of(A) is None
    board.step(12.0, 0.5, prompt(A, 500))
    board.look()
    board.ledger.forget(A)
    board.ledger.forget(A)
    assert board.ledger.use_of(A) is None
    board.ledger.settle(board.meter.draw(2.0, 40.0))
    assert board.ledger.totals()["module", "measured", "edge"] == pytest.approx(5.0)


def test_the_panel_hears_what_was_worked() -> None:
    board = Board()
    board.step(12.0, 0.5, prompt(A, 500))
    assert board.panel.seconds == 0.5
    assert board.panel.joules == pytest.approx(0.5 * 8)
