"""Somebody in between: whatever is not the message that was sent, in its place, does not open.

Every refusal is the one error without a reason, and nothing else is ever raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from linklab import DEVICE_ID, HANDLE, PREKEY_ID, Peers, new_peers

from tidegate.errors import SealError
from tidegate.link.chunks import FINAL
from tidegate.link.envelope import (
    DeviceAttempt,
    GatewayAttempt,
    MessageType,
    RequestId,
    new_request_id,
    route,
    seal_request,
)
from tidegate.link.opening import PartialRequest, open_first
from tidegate.link.suites import HYBRID, SUITES, X25519, PrivatePrekey
from tidegate.link.wire import CHUNK_HEAD, CONTROL_HEAD, FRAGMENT_BYTES, HEADER

PEERS = new_peers()
BOTH = [PEERS, new_peers(HYBRID)]
FLAGS_AT = CHUNK_HEAD.size - 1
both_suites = pytest.mark.parametrize("peers", BOTH, ids=["X25519", "hybrid"])


def refused(act: Callable[..., object], *arguments: object) -> bool:
    """True when `act` raises the one error; any other one fails the test."""
    try:
        act(*arguments)
    except SealError as error:
        return str(error) == "message could not be opened" and error.__cause__ is None
    return False


def every_flip(message: bytes, places: Iterable[int] | None = None) -> list[bytes]:
    """`message` with one bit of one byte wrong: every byte once, and every bit in turn."""
    return [
        message[:i] + bytes((message[i] ^ (1 << (i % 8)),)) + message[i + 1 :]
        for i in (range(len(message)) if places is None else places)
    ]


def every_cut(message: bytes) -> list[bytes]:
    return [message[:length] for length in range(len(message))]


def pair(peers: Peers) -> tuple[DeviceAttempt, GatewayAttempt]:
    message, device = peers.seal(b"secret")
    return device, peers.open(message)


def two_parts(peers: Peers = PEERS, attempt: int = 0) -> list[bytes]:
    """A request of two messages."""
    messages, _ = peers.seal_all(
        bytes(FRAGMENT_BYTES), request_id=RequestId(b"request-id-16byt"), attempt=attempt
    )
    assert len(messages) == 2
    return messages


@both_suites
def test_a_request_with_any_byte_wrong_or_cut_anywhere_does_not_open(peers: Peers) -> None:
    message, _ = peers.seal(b"secret")
    damaged = every_flip(message) + every_cut(message)
    assert all(refused(peers.open, one) for one in damaged)
    assert peers.open(message).body == b"secret"


@both_suites
def test_an_answer_with_any_byte_wrong_or_cut_anywhere_does_not_open(peers: Peers) -> None:
    device, gateway = pair(peers)
    answer = gateway.seal_response(b"rising", final=True)
    damaged = every_flip(answer) + every_cut(answer)
    assert all(refused(device.open_response, one) for one in damaged)
    assert device.open_response(answer)[2] == b"rising"
    assert all(refused(device.open_response, one) for one in damaged)


def test_an_answer_without_a_signature_with_any_byte_wrong_does_not_open() -> None:
    device, gateway = pair(PEERS)
    device.open_response(gateway.seal_response(b"", final=False))
    gateway.open_control(device.seal_control(b""))
    answer = gateway.seal_response(b"rising", final=False)
    damaged = every_flip(answer) + every_cut(answer)
    assert all(refused(device.open_response, one) for one in damaged)
    assert device.open_response(answer)[2] == b"rising"


def test_a_control_with_any_byte_wrong_or_cut_anywhere_does_not_open() -> None:
    device, gateway = pair(PEERS)
    control = device.seal_control(b"ack")
    damaged = every_flip(control) + every_cut(control)
    assert all(refused(gateway.open_control, one) for one in damaged)
    assert gateway.open_control(control) == b"ack"


def test_a_part_with_a_byte_of_its_head_wrong_or_cut_does_not_open() -> None:
    first, second = two_parts()
    partial = PEERS.open_first(first)
    far = range(CHUNK_HEAD.size + 64, len(second), 997)
    damaged = every_flip(second, [*range(far.start), *far, len(second) - 1])
    damaged += [second[:length] for length in [*range(far.start), *far, len(second) - 1]]
    assert all(refused(partial.take, one) for one in damaged)
    partial.take(second)
    assert partial.finish(PEERS.gateway_key).body == bytes(FRAGMENT_BYTES)


def test_a_request_opens_only_on_the_topic_of_its_device() -> None:
    message, _ = PEERS.seal(b"secret")
    assert refused(lambda: PEERS.open(message, handle=HANDLE[::-1]))


@pytest.mark.parametrize("handle", ["", "\u00e9", "x" * 70_000])
def test_a_topic_that_no_device_has_is_refused_like_any_other(handle: str) -> None:
    message, _ = PEERS.seal(b"secret")
    stranger = Peers(
        prekey=PEERS.prekey, device_key=PEERS.device_key, gateway_key=PEERS.gateway_key
    )
    assert refused(
        lambda: open_first(
            message,
            handle=handle,
            find_prekey=lambda suite, prekey_id: stranger.prekey,
            find_device=lambda device_id: [stranger.device_key.public_key()],
        )
    )


def test_a_request_from_an_unknown_or_revoked_device_does_not_open() -> None:
    message, _ = PEERS.seal(b"secret")
    assert refused(
        lambda: open_first(
            message,
            handle=HANDLE,
            find_prekey=lambda suite, prekey_id: PEERS.prekey,
            find_device=lambda device_id: [],
        )
    )


def test_a_request_signed_by_another_device_does_not_open() -> None:
    impostor = Peers(
        prekey=PEERS.prekey,
        device_key=Ed25519PrivateKey.generate(),
        gateway_key=PEERS.gateway_key,
    )
    message, _ = impostor.seal(b"secret")
    assert refused(lambda: PEERS.open(message))


@both_suites
def test_a_request_under_a_prekey_that_is_gone_does_not_open(peers: Peers) -> None:
    message, _ = peers.seal(b"secret")
    assert refused(
        lambda: open_first(
            message,
            handle=HANDLE,
            find_prekey=lambda suite, prekey_id: None,
            find_device=lambda device_id: [peers.device_key.public_key()],
        )
    )


@both_suites
@pytest.mark.parametrize("suite", [0, 1, 2, 3, 255])
def test_another_suite_byte_does_not_open_whatever_prekey_is_found(
    peers: Peers, suite: int
) -> None:
    message, _ = peers.seal(b"secret")
    own = peers.prekey.public.suite
    if suite == own:
        return
    other = PrivatePrekey.generate(suite) if suite in SUITES else peers.prekey
    for prekey in (peers.prekey, other):
        assert refused(
            lambda prekey=prekey: open_first(
                message[:4] + bytes((suite,)) + message[5:],
                handle=HANDLE,
                find_prekey=lambda suite, prekey_id: prekey,
                find_device=lambda device_id: [peers.device_key.public_key()],
            )
        )


def test_a_device_that_seals_the_weaker_suite_to_a_stronger_prekeys_name_is_refused() -> None:
    hybrid = BOTH[1]
    weak = PrivatePrekey.generate(X25519)
    (message,), _ = seal_request(
        b"secret",
        request_id=new_request_id(1),
        attempt=0,
        prekey_id=PREKEY_ID,
        prekey=weak.public,
        gateway_key=hybrid.gateway_key.public_key(),
        device_id=DEVICE_ID,
        device_key=hybrid.device_key,
        handle=HANDLE,
    )
    assert refused(lambda: hybrid.open(message))


def test_an_answer_to_one_attempt_does_not_open_in_another() -> None:
    request_id = new_request_id(1)
    first, _ = PEERS.seal(b"a", request_id=request_id, attempt=0)
    _, second_keys = PEERS.seal(b"a", request_id=request_id, attempt=1)
    answer = PEERS.open(first).seal_response(b"rising", final=True)
    renamed = answer[:17] + (1).to_bytes(2, "big") + answer[19:]
    assert refused(lambda: second_keys.open_response(answer))
    assert refused(lambda: second_keys.open_response(renamed))


def test_an_answer_to_another_request_does_not_open_under_any_name() -> None:
    (device, _), (_, gateway) = pair(PEERS), pair(PEERS)
    answer = gateway.seal_response(b"rising", final=True)
    renamed = answer[:1] + device.request_id + answer[17:]
    assert refused(lambda: device.open_response(answer))
    assert refused(lambda: device.open_response(renamed))


def test_a_signature_of_one_answer_does_not_serve_another() -> None:
    (device, own), (other_device, other) = pair(PEERS), pair(PEERS)
    answer, foreign = (end.seal_response(b"rising", final=True) for end in (own, other))
    spliced = answer[: CHUNK_HEAD.size] + foreign[CHUNK_HEAD.size : CHUNK_HEAD.size + 96]
    assert refused(lambda: device.open_response(spliced + answer[CHUNK_HEAD.size + 96 :]))
    assert refused(lambda: device.open_response(spliced + foreign[CHUNK_HEAD.size + 96 :]))
    assert other_device.open_response(foreign)[2] == b"rising"


def test_a_chunk_that_is_robbed_of_its_signature_does_not_open() -> None:
    device, gateway = pair(PEERS)
    device.open_response(gateway.seal_response(b"", final=False))
    signed = gateway.seal_response(b"rising", final=False)
    bare = signed[: CHUNK_HEAD.size - 1] + b"\0" + signed[CHUNK_HEAD.size + 96 :]
    assert refused(device.open_response, bare)
    assert device.open_response(signed)[2] == b"rising"


def test_no_message_opens_as_one_of_another_kind_or_direction() -> None:
    messages, device = PEERS.seal_all(bytes(FRAGMENT_BYTES))
    gateway, partial = PEERS.open(*messages), PEERS.open_first(messages[0])
    answer, control = gateway.seal_response(b"x", final=False), device.seal_control(b"x")
    part = messages[1]
    flag = control[: CONTROL_HEAD.size] + b"\0" + control[CONTROL_HEAD.size :]
    for message in (messages[0], part, answer, control, flag):
        for kind in MessageType:
            renamed = bytes((kind,)) + message[1:]
            if renamed != answer:
                assert refused(device.open_response, renamed)
            if renamed != control:
                assert refused(gateway.open_control, renamed)
            if renamed != part:
                assert refused(partial.take, renamed)
            if renamed != messages[0]:
                assert refused(PEERS.open_first, renamed)


def test_a_chunk_under_another_number_or_with_a_forged_final_does_not_open() -> None:
    device, gateway = pair(PEERS)
    chunks = [gateway.seal_response(bytes((n,)), final=n == 3) for n in range(4)]
    for n, chunk in enumerate(chunks):
        for other in {0, 1, 2, 3, 4, 2**63, 2**64 - 1} - {n}:
            moved = chunk[:19] + other.to_bytes(8, "big") + chunk[27:]
            assert refused(device.open_response, moved)
        for flags in set(range(256)) - {chunk[FLAGS_AT]}:
            forged = chunk[:FLAGS_AT] + bytes((flags,)) + chunk[FLAGS_AT + 1 :]
            assert refused(device.open_response, forged)
    assert [device.open_response(chunk)[0] for chunk in reversed(chunks)] == [3, 2, 1, 0]


def test_an_older_control_is_refused_after_a_newer_one() -> None:
    device, gateway = pair(PEERS)
    older, newer = device.seal_control(b"1"), device.seal_control(b"2")
    assert gateway.open_control(newer) == b"2"
    assert refused(lambda: gateway.open_control(older))
    assert refused(lambda: gateway.open_control(newer))


def test_parts_of_another_request_or_attempt_are_refused() -> None:
    first, _ = two_parts()
    foreign = two_parts(new_peers())[1]
    later = two_parts(attempt=1)[1]
    renamed = later[:17] + (0).to_bytes(2, "big") + later[19:]
    partial = PEERS.open_first(first)
    for part in (foreign, later, renamed, first):
        assert refused(partial.take, part)
    assert refused(lambda: partial.finish(PEERS.gateway_key))


def test_a_part_may_not_forge_final_or_move() -> None:
    first, second = two_parts()
    partial = PEERS.open_first(first)
    assert second[FLAGS_AT] == FINAL
    for flags in range(256):
        forged = second[:FLAGS_AT] + bytes((flags,)) + second[FLAGS_AT + 1 :]
        assert flags == FINAL or refused(partial.take, forged)
    for n in (0, 2, 2**64 - 1):
        moved = second[:19] + n.to_bytes(8, "big") + second[27:]
        assert refused(partial.take, moved)
    assert not partial.complete


@pytest.mark.parametrize("junk", [b"", b"\x01", b"\x02" * 28, b"\x04" * 64, bytes(98304)])
def test_nothing_but_the_one_error_is_ever_raised(junk: bytes) -> None:
    device, gateway = pair(PEERS)
    partial: PartialRequest = PEERS.open_first(two_parts()[0])
    for act in (device.open_response, gateway.open_control, partial.take, PEERS.open_first):
        assert refused(act, junk)


@given(st.binary(max_size=200))
def test_any_bytes_are_routed_or_refused(data: bytes) -> None:
    try:
        where = route(data)
    except SealError:
        return
    assert where.kind in MessageType
    assert len(where.request_id) == 16


@given(st.binary(max_size=1400))
def test_any_bytes_behind_a_good_head_are_refused(data: bytes) -> None:
    message, device = PEERS.seal(b"a", request_id=RequestId(bytes(16)))
    gateway, partial = PEERS.open(message), PEERS.open_first(two_parts()[0])
    for head in (message[: 1 + HEADER.size], message[:111], message[:112], b""):
        assert refused(PEERS.open, head + data)
    answer = gateway.seal_response(b"", final=False)
    for head in (answer[: CHUNK_HEAD.size], answer[: CHUNK_HEAD.size + 96]):
        assert refused(device.open_response, head + data)
    control, part = device.seal_control(b""), two_parts()[1]
    assert refused(lambda: gateway.open_control(control[: CONTROL_HEAD.size] + data))
    assert refused(lambda: partial.take(part[: CHUNK_HEAD.size] + data))
