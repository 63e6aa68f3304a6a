"""The gateway's side of one request, event by event on a hand-set clock."""

from __future__ import annotations

from tidegate.link.gateway_session import GatewaySession
from tidegate.link.gateway_states import State
from tidegate.link.messages import Bundle, Control, ControlKind, Prefix, Status
from tidegate.link.timing import Timing

TIMING = Timing(heartbeat_s=2.0, silence_s=7.0, lease_s=60.0, credit=4, pacing="off")


def new_session(stored: list[bytes] | None = None) -> GatewaySession:
    return GatewaySession(timing=TIMING, now_s=0.0, stored=stored or [])


def ack(have: int, seen: int, *, rewind: bool = False, credit: int = 4) -> Control:
    return Control(kind=ControlKind.ACK, have=have, credit=credit, seen=seen, rewind=rewind)


def test_an_accepted_request_is_answered_at_once_and_then_shows_life() -> None:
    session = new_session()
    assert session.poll(0.0) == [Bundle(first=0)]
    assert session.poll(1.9) == []
    assert session.poll(2.0) == [Bundle(first=0)]


def test_payloads_that_are_ready_together_travel_together() -> None:
    session = new_session()
    for payload in (b"a", b"b", b"c"):
        session.produce(payload)
    assert session.poll(0.0) == [Bundle(first=0, payloads=(b"a", b"b", b"c"))]


def test_it_stops_at_the_window_and_goes_on_when_acknowledged() -> None:
    session = new_session()
    sent = []
    for number in range(6):
        session.produce(b"%d" % number)
        sent += session.poll(0.0)
    assert len(sent) == TIMING.credit
    session.on_ack(0.1, ack(2, 2))
    assert session.poll(0.1) == [Bundle(first=4, payloads=(b"4", b"5"))]


def test_the_device_may_shrink_the_window() -> None:
    session = new_session()
    session.on_ack(0.0, ack(0, 0, credit=1))
    for number in range(3):
        session.produce(b"%d" % number)
        session.poll(0.0)
    assert session.poll(0.0) == []


def test_the_end_travels_with_the_last_payloads_and_repeats_until_heard() -> None:
    session = new_session()
    session.produce(b"a")
    session.finish(Status.COMPLETE, "")
    assert session.poll(0.0) == [Bundle(first=0, payloads=(b"a",), status=Status.COMPLETE)]
    assert session.poll(1.0) == []
    assert session.poll(2.0) == [Bundle(first=1, status=Status.COMPLETE)]
    session.on_done()
    assert session.state is State.CLOSED
    assert session.poll(9.0) == []


def test_a_gap_sends_it_back_once() -> None:
    session = new_session()
    for number in range(3):
        session.produce(b"%d" % number)
        session.poll(0.0)
    assert session.on_ack(0.1, ack(1, 3, rewind=True))
    assert session.poll(0.1) == [Bundle(first=1, payloads=(b"1", b"2"))]
    assert not session.on_ack(0.2, ack(1, 3, rewind=True)), "this asking crossed the rewind"
    assert session.poll(0.2) == []
    assert session.on_ack(0.3, ack(1, 4, rewind=True)), "this one has seen what came after it"


def test_a_new_attempt_is_served_from_what_the_device_has() -> None:
    session = new_session()
    for payload in (b"a", b"b", b"c"):
        session.produce(payload)
    session.poll(0.0)
    session.on_request(1.0, have=2, credit=4, ttl_s=60.0)
    assert session.poll(1.0) == [Bundle(first=2, payloads=(b"c",))]


def test_a_restarted_handler_repeats_what_was_stored_and_it_is_skipped() -> None:
    session = new_session([b"a", b"b"])
    assert session.produce(b"a") is None
    assert session.produce(b"b") is None
    assert session.produce(b"c") == 2
    assert session.poll(0.0) == [Bundle(first=0, payloads=(b"a", b"b", b"c"))]


def test_a_repetition_that_differs_fails_it_and_sends_nothing_new() -> None:
    session = new_session([b"a", b"b"])
    assert session.produce(b"x") is None
    assert session.diverged
    assert session.poll(0.0) == [
        Bundle(first=0, payloads=(b"a", b"b"), status=Status.FAILED, code="answer_diverged")
    ]


def test_a_run_that_fails_before_it_repeated_everything_says_why() -> None:
    session = new_session([b"a", b"b"])
    assert session.finish(Status.FAILED, "over_capacity") == (Status.FAILED, "over_capacity")


def test_a_device_with_another_answer_than_ours_is_sent_none_of_it() -> None:
    session = new_session()
    for payload in (b"a", b"b", b"c"):
        session.produce(payload)
    proof = Prefix([b"a", b"x"]).proof()
    session.on_request(0.0, have=2, credit=4, ttl_s=60.0, proof=proof)
    assert session.diverged
    assert session.poll(0.0) == [Bundle(first=2, status=Status.FAILED, code="answer_diverged")]


def test_a_credit_of_nothing_is_a_credit_of_one() -> None:
    session = new_session()
    session.on_request(0.0, have=0, credit=0, ttl_s=60.0)
    session.produce(b"a")
    assert session.poll(0.0) == [Bundle(first=0, payloads=(b"a",))]


def test_a_device_that_has_more_than_we_waits_for_the_handler_to_catch_up() -> None:
    session = new_session()
    session.on_request(0.0, have=2, credit=4, ttl_s=60.0)
    session.produce(b"a")
    session.produce(b"b")
    assert session.poll(0.0) == [Bundle(first=2)]
    session.produce(b"c")
    assert session.poll(0.0) == [Bundle(first=2, payloads=(b"c",))]


def test_an_answer_shorter_than_the_device_claims_says_so() -> None:
    session = new_session()
    session.on_request(0.0, have=5, credit=4, ttl_s=60.0)
    session.produce(b"a")
    session.finish(Status.COMPLETE, "")
    (final,) = session.poll(0.0)
    assert (final.end, final.status) == (1, Status.COMPLETE)


def test_a_device_that_says_nothing_loses_its_lease() -> None:
    session = new_session()
    session.on_ack(10.0, ack(0, 0))
    assert session.poll(69.9) == [Bundle(first=0)]
    assert session.poll(70.0) == []
    assert session.state is State.PARKED


def test_a_request_ends_with_its_deadline_even_while_the_device_talks() -> None:
    session = new_session()
    session.on_request(0.0, have=0, credit=4, ttl_s=5.0)
    session.on_ack(4.9, ack(0, 0))
    assert session.poll(5.0) == []
    assert session.state is State.PARKED


def test_room_for_the_handler_is_what_has_left_for_the_first_time() -> None:
    session = new_session()
    for number in range(3):
        session.produce(b"%d" % number)
    assert session.take_released() == 0
    session.poll(0.0)
    assert session.take_released() == 3
    session.on_ack(0.1, ack(0, 1, rewind=True))
    session.poll(0.1)
    assert session.take_released() == 0


def test_an_acknowledgement_of_more_than_exists_is_taken_for_what_exists() -> None:
    session = new_session()
    session.produce(b"a")
    session.poll(0.0)
    session.on_ack(0.1, ack(2**32 - 1, 2**63))
    session.produce(b"b")
    assert session.poll(0.1) == [Bundle(first=1, payloads=(b"b",))]


def test_a_device_said_to_be_gone_has_its_lease_shortened_and_one_word_restores_it() -> None:
    gone, back = new_session(), new_session()
    for session in (gone, back):
        session.poll(0.0)
        session.hint_gone(10.0)
    back.on_ack(12.0, ack(0, 0))
    for session in (gone, back):
        session.poll(16.9)
        assert session.state is not State.PARKED
        session.poll(17.0)
    assert gone.state is State.PARKED
    assert back.state is not State.PARKED


def test_a_hint_never_makes_a_lease_longer() -> None:
    session = new_session()
    session.hint_gone(58.0)
    session.poll(60.0)
    assert session.state is State.PARKED
