"""Requests of several messages: whole in any order, and never more held than is allowed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linklab import HANDLE, Peers, new_peers

from tidegate.errors import SealError
from tidegate.link import assembly
from tidegate.link.assembly import HELD_FOR_S, MAX_HELD_PER_DEVICE, Assembler
from tidegate.link.envelope import RequestId
from tidegate.link.opening import PartialRequest
from tidegate.link.suites import HYBRID
from tidegate.link.wire import FRAGMENT_BYTES, OPENING

PEERS = new_peers(HYBRID)
FOUR_PARTS = bytes(3 * FRAGMENT_BYTES)
SOLO_BYTES = FRAGMENT_BYTES - OPENING.size
"""The longest body of one message."""


def new_assembler(peers: Peers = PEERS) -> Assembler:
    return Assembler(lambda handle, message: peers.open_first(message, handle=handle))


def body_of(partial: PartialRequest | None) -> bytes:
    assert partial is not None
    return partial.finish(PEERS.gateway_key).body


def first_of(number: int, attempt: int = 0, body: bytes = FOUR_PARTS) -> bytes:
    request_id = RequestId(number.to_bytes(16, "big"))
    return PEERS.seal_all(body, request_id=request_id, attempt=attempt)[0][0]


def test_a_request_of_one_message_is_whole_at_once() -> None:
    message, _ = PEERS.seal(bytes(SOLO_BYTES))
    assembler = new_assembler()
    assert body_of(assembler.receive(0.0, HANDLE, message)) == bytes(SOLO_BYTES)
    assert assembler.held_bytes == 0


@settings(max_examples=25)
@given(st.integers(1, 4 * FRAGMENT_BYTES), st.randoms(use_true_random=False))
def test_parts_in_any_order_and_more_than_once_make_the_body(body_bytes: int, rng: object) -> None:
    body = bytes(n * 31 % 251 for n in range(251)) * (body_bytes // 251 + 1)
    body = body[:body_bytes]
    messages, _ = PEERS.seal_all(body)
    order = list(range(1, len(messages)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    assembler, got = new_assembler(), None
    for n in [0, *order]:
        assert got is None
        got = assembler.receive(0.0, HANDLE, messages[n])
        if got is None:
            assert assembler.receive(0.0, HANDLE, messages[n]) is None
    assert body_of(got) == body
    assert assembler.held_bytes == 0


def test_a_part_that_comes_before_the_first_or_after_the_end_belongs_to_nothing() -> None:
    messages, _ = PEERS.seal_all(bytes(FRAGMENT_BYTES))
    assembler = new_assembler()
    for _ in range(2):
        with pytest.raises(SealError):
            assembler.receive(0.0, HANDLE, messages[1])
        assert assembler.receive(0.0, HANDLE, messages[0]) is None
        assert assembler.receive(0.0, HANDLE, messages[1]) is not None


def test_a_part_on_the_topic_of_another_device_belongs_to_nothing() -> None:
    messages, _ = PEERS.seal_all(bytes(FRAGMENT_BYTES))
    assembler = new_assembler()
    assembler.receive(0.0, HANDLE, messages[0])
    with pytest.raises(SealError):
        assembler.receive(0.0, HANDLE[::-1], messages[1])
    assert assembler.receive(0.0, HANDLE, messages[1]) is not None


def test_a_damaged_part_loses_nothing_of_what_was_there() -> None:
    messages, _ = PEERS.seal_all(bytes(FRAGMENT_BYTES))
    assembler = new_assembler()
    assembler.receive(0.0, HANDLE, messages[0])
    with pytest.raises(SealError):
        assembler.receive(0.0, HANDLE, messages[1][:-1] + b"\0")
    assert body_of(assembler.receive(0.0, HANDLE, messages[1])) == bytes(FRAGMENT_BYTES)


def test_a_newer_attempt_takes_the_place_of_an_older_one_and_never_the_reverse() -> None:
    assembler = new_assembler()
    assembler.receive(0.0, HANDLE, first_of(7, attempt=1))
    assert assembler.receive(0.0, HANDLE, first_of(7, attempt=0)) is None
    request_id = RequestId((7).to_bytes(16, "big"))
    newer, _ = PEERS.seal_all(bytes(FRAGMENT_BYTES), request_id=request_id, attempt=2)
    assembler.receive(0.0, HANDLE, newer[0])
    assert assembler.held_bytes == FRAGMENT_BYTES
    whole = assembler.receive(0.0, HANDLE, newer[1])
    assert whole is not None
    assert whole.attempt == 2


def test_one_device_holds_a_few_requests_at_most() -> None:
    assembler = new_assembler()
    for number in range(MAX_HELD_PER_DEVICE):
        assembler.receive(0.0, HANDLE, first_of(number))
    with pytest.raises(SealError):
        assembler.receive(0.0, HANDLE, first_of(99))
    assert assembler.held_bytes == MAX_HELD_PER_DEVICE * len(FOUR_PARTS)
    assembler.receive(HELD_FOR_S, HANDLE, first_of(99))
    assert assembler.held_bytes == len(FOUR_PARTS)


def test_room_is_taken_for_the_whole_announced_length_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assembly, "MAX_HELD_BYTES", 2 * len(FOUR_PARTS) - 1)
    assembler = new_assembler()
    assembler.receive(0.0, HANDLE, first_of(1))
    with pytest.raises(SealError):
        assembler.receive(0.0, HANDLE, first_of(2))
    assert assembler.held_bytes == len(FOUR_PARTS)


TWO_REQUESTS = [
    PEERS.seal_all(bytes((n,)) * (2 * FRAGMENT_BYTES), request_id=RequestId(bytes((n,)) * 16))[0]
    for n in range(2)
]
attacks = st.lists(
    st.tuples(
        st.sampled_from(["pass", "pass", "flip", "cut", "splice", "rename", "renumber"]),
        st.integers(0, 1),
        st.integers(0, 2),
        st.integers(1, 10**6),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(attacks)
def test_no_attack_on_parts_makes_another_body(attack: list[tuple[str, int, int, int]]) -> None:
    assembler = new_assembler()
    bodies = []
    for act, request, n, at in attack:
        right = TWO_REQUESTS[request][n]
        other = TWO_REQUESTS[1 - request][n]
        damaged = {
            "pass": right,
            "flip": right[: at % len(right)] + b"!" + right[at % len(right) + 1 :],
            "cut": right[: at % len(right)],
            "splice": right[:28] + other[28:],
            "rename": right[:1] + other[1:17] + right[17:],
            "renumber": right[:26] + bytes((at % 4,)) + right[27:],
        }[act]
        try:
            whole = assembler.receive(0.0, HANDLE, damaged)
        except SealError:
            continue
        # What was not refused is a message as it was sent, or "!" in place of "!".
        assert damaged in TWO_REQUESTS[request]
        if whole is not None:
            bodies.append((request, body_of(whole)))
    for request, body in bodies:
        assert body == bytes((request,)) * (2 * FRAGMENT_BYTES)


def test_a_body_that_is_not_the_signed_one_is_refused() -> None:
    partial = PEERS.open_first(PEERS.seal(b"what was signed")[0])
    partial._digest = bytes(32)
    with pytest.raises(SealError):
        partial.finish(PEERS.gateway_key)
