"""The device's side of one request, event by event on a hand-set clock."""

from __future__ import annotations

import dataclasses
import random

import pytest

from tidegate.errors import ConfigError
from tidegate.link.device_session import (
    Deliver,
    DeviceSession,
    End,
    SendAck,
    SendCancel,
)
from tidegate.link.device_states import State
from tidegate.link.messages import MAX_ANSWER_BYTES, Bundle, Status
from tidegate.link.timing import Timing, backoff_s

TIMING = Timing(ack_delay_s=0.2, heartbeat_s=2.0, silence_s=7.0, credit=16)


def new_session(*, connect_by_s: float | None = None, have: int = 0) -> DeviceSession:
    return DeviceSession(
        timing=TIMING,
        rng=random.Random(1),
        now_s=0.0,
        deadline_s=100.0,
        connect_by_s=connect_by_s,
        have=have,
    )


def sent_session() -> DeviceSession:
    session = new_session()
    session.send(0.0)
    return session


def test_a_request_is_due_at_once_and_then_backs_off_with_jitter() -> None:
    session = new_session()
    assert session.due_to_send(0.0)
    waits = []
    now_s = 0.0
    for expected in range(8):
        assert session.send(now_s) == expected
        due_s = session.next_wakeup_s()
        waits.append(due_s - now_s)
        assert not session.due_to_send(due_s - 0.001)
        assert session.due_to_send(due_s)
        now_s = due_s
    for tries, wait_s in enumerate(waits):
        longest_s = min(30.0, 2.0**tries)
        assert longest_s / 2 <= wait_s <= longest_s


def test_backoff_never_overflows() -> None:
    assert backoff_s(10_000, random.Random(0), Timing()) <= Timing().resend_max_s


def test_a_sign_of_life_means_accepted_and_puts_off_the_next_attempt() -> None:
    session = sent_session()
    assert session.on_bundle(0.1, 0, 0, Bundle(first=0)) == []
    assert session.state is State.ACCEPTED
    assert not session.due_to_send(0.1 + TIMING.silence_s - 0.1)
    assert session.due_to_send(0.1 + 1.5 * TIMING.silence_s)
    assert session.silent_sends == 0


def test_payloads_are_delivered_once_and_acknowledged_after_a_moment() -> None:
    session = sent_session()
    bundle = Bundle(first=0, payloads=(b"a", b"b"))
    assert session.on_bundle(1.0, 0, 0, bundle) == [Deliver(0, (b"a", b"b"))]
    assert session.state is State.STREAMING
    assert session.on_bundle(1.0, 0, 0, bundle) == []
    assert session.poll(1.1) == []
    assert session.poll(1.2) == [SendAck()]
    assert session.poll(1.3) == []


def test_overlapping_bundles_deliver_only_what_is_new() -> None:
    session = sent_session()
    session.on_bundle(1.0, 0, 0, Bundle(first=0, payloads=(b"a", b"b")))
    actions = session.on_bundle(1.0, 0, 1, Bundle(first=1, payloads=(b"b", b"c")))
    assert actions[0] == Deliver(2, (b"c",))


def test_a_quarter_of_the_window_is_acknowledged_at_once() -> None:
    session = sent_session()
    for number in range(TIMING.credit // 4 - 1):
        (delivery,) = session.on_bundle(1.0, 0, number, Bundle(first=number, payloads=(b"a",)))
        assert delivery == Deliver(number, (b"a",))
    actions = session.on_bundle(1.0, 0, 3, Bundle(first=3, payloads=(b"b",)))
    assert actions == [Deliver(3, (b"b",)), SendAck()]


def test_a_gap_is_reported_at_once_and_then_only_now_and_then() -> None:
    session = sent_session()
    assert session.on_bundle(1.0, 0, 1, Bundle(first=1, payloads=(b"b",))) == [SendAck(rewind=True)]
    assert session.on_bundle(1.0, 0, 2, Bundle(first=2, payloads=(b"c",))) in (
        [],
        [SendAck(rewind=True)],
    )
    assert session.poll(1.0 + TIMING.heartbeat_s) == [SendAck(rewind=True)]
    actions = session.on_bundle(4.0, 0, 3, Bundle(first=0, payloads=(b"a",)))
    assert actions[0] == Deliver(0, (b"a", b"b", b"c"))


def test_a_sign_of_life_shows_a_lost_tail() -> None:
    session = sent_session()
    assert session.on_bundle(1.0, 0, 3, Bundle(first=3)) == [SendAck(rewind=True)]


def test_the_end_waits_for_everything_before_it() -> None:
    session = sent_session()
    final = Bundle(first=1, payloads=(b"b",), status=Status.COMPLETE)
    assert session.on_bundle(1.0, 0, 1, final) == [SendAck(rewind=True)]
    actions = session.on_bundle(1.1, 0, 2, Bundle(first=0, payloads=(b"a",)))
    assert actions == [Deliver(0, (b"a", b"b")), SendAck(done=True), End(State.DONE)]
    assert session.on_bundle(1.2, 0, 3, final) == []


def test_an_empty_answer_is_an_answer() -> None:
    session = sent_session()
    assert session.on_bundle(1.0, 0, 0, Bundle(first=0, status=Status.COMPLETE)) == [
        SendAck(done=True),
        End(State.DONE),
    ]


def test_a_failure_at_the_gateway_ends_it_after_what_was_said() -> None:
    session = sent_session()
    failed = Bundle(first=0, payloads=(b"a",), status=Status.FAILED, code="execution_failed")
    assert session.on_bundle(1.0, 0, 0, failed) == [
        Deliver(0, (b"a",)),
        SendAck(done=True),
        End(State.FAILED, "execution_failed"),
    ]


def test_an_answer_shorter_than_what_was_delivered_is_never_spliced() -> None:
    session = new_session(have=5)
    session.send(0.0)
    actions = session.on_bundle(1.0, 0, 0, Bundle(first=3, status=Status.COMPLETE))
    assert actions[-1] == End(State.FAILED, "answer_diverged")


def test_an_answer_without_end_is_stopped() -> None:
    session = sent_session()
    payload = bytes(60_000)
    actions = []
    for number in range(MAX_ANSWER_BYTES // len(payload) + 1):
        actions = session.on_bundle(1.0, 0, number, Bundle(first=number, payloads=(payload,)))
    assert actions[-2:] == [SendCancel(), End(State.FAILED, "answer_too_large")]


def test_bundles_from_far_ahead_are_held_within_the_window_only() -> None:
    session = sent_session()
    for first in range(1, 200):
        session.on_bundle(1.0, 0, first, Bundle(first=first, payloads=(b"x",)))
    (delivered, *_) = session.on_bundle(1.0, 0, 200, Bundle(first=0, payloads=(b"x",)))
    assert isinstance(delivered, Deliver)
    assert len(delivered.payloads) == 1 + TIMING.credit


def test_only_the_newest_attempt_heard_of_counts_as_seen() -> None:
    session = sent_session()
    session.send(1.0)
    session.on_bundle(1.0, 0, 9, Bundle(first=0))
    assert (session.heard_attempt, session.seen) == (0, 10)
    session.on_bundle(1.0, 1, 0, Bundle(first=0))
    session.on_bundle(1.0, 0, 10, Bundle(first=0))
    assert (session.heard_attempt, session.seen) == (1, 1)


def test_the_deadline_ends_it_and_tells_the_gateway() -> None:
    session = sent_session()
    assert session.poll(99.9) == []
    assert session.poll(100.0) == [SendCancel(), End(State.FAILED, "deadline_exceeded")]
    assert session.poll(101.0) == []


def test_without_a_gateway_it_gives_up_after_the_connect_timeout() -> None:
    session = new_session(connect_by_s=10.0)
    session.postpone(0.0)
    assert session.poll(9.9) == []
    assert session.poll(10.0) == [End(State.FAILED, "no_gateway")]


def test_once_sent_the_connect_timeout_is_over() -> None:
    session = new_session(connect_by_s=10.0)
    session.send(1.0)
    assert session.poll(11.0) == []


def test_cancelling_tells_the_gateway_only_if_it_may_know() -> None:
    assert new_session().cancel() == [End(State.CANCELLED)]
    session = sent_session()
    assert session.cancel() == [SendCancel(), End(State.CANCELLED)]
    assert session.cancel() == []


def test_a_restored_connection_asks_again_soon() -> None:
    session = sent_session()
    session.on_bundle(0.1, 0, 0, Bundle(first=0))
    session.nudge(3.0)
    assert session.due_to_send(3.1)


@pytest.mark.parametrize(
    "change",
    [
        {"credit": 0},
        {"tick_s": 2.0},
        {"heartbeat_s": 8.0},
        {"lease_s": 1.0},
        {"resend_min_s": 0},
        {"window": 0},
        {"pacing": "later"},
        {"chunk_bytes": 100},
    ],
)
def test_waits_that_make_no_sense_together_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"link\."):
        dataclasses.replace(Timing(), **change)  # type: ignore[arg-type]


def due_s(session: DeviceSession, from_s: float) -> float:
    """When it next wants to send, looking closely."""
    return next(t / 100 for t in range(int(from_s * 100), 5000) if session.due_to_send(t / 100))


def test_a_gateway_that_announces_itself_is_asked_again_if_it_owes_a_word() -> None:
    session = sent_session()
    session.on_bundle(0.1, 0, 0, Bundle(first=0))
    assert due_s(session, 0.1) > TIMING.silence_s
    # Two signs of life have not come: it was away, or they are lost.
    session.gateway_lives(3.5)
    assert due_s(session, 3.5) <= 4.0


def test_a_gateway_that_announces_itself_on_its_beat_is_asked_nothing() -> None:
    session = sent_session()
    session.on_bundle(1.0, 0, 0, Bundle(first=0))
    session.gateway_lives(1.0 + TIMING.heartbeat_s)
    assert due_s(session, 1.0) > TIMING.silence_s
    fresh = sent_session()
    before = due_s(fresh, 0.0)
    fresh.gateway_lives(0.4)
    assert due_s(fresh, 0.0) == before, "our request is still on its way"


def test_a_request_that_was_not_heard_is_sent_again_when_its_gateway_comes_back() -> None:
    session = sent_session()
    now_s = 0.0
    for _ in range(5):
        now_s = session.next_wakeup_s()
        session.send(now_s)
    assert session.next_wakeup_s() > now_s + 10.0
    session.gateway_lives(now_s + 1.5)
    assert due_s(session, now_s) <= now_s + 2.01


def test_what_has_ended_asks_nobody() -> None:
    session = sent_session()
    session.cancel()
    session.gateway_lives(50.0)
    assert not session.due_to_send(60.0)
