"""The envelope: what opens, and that everything else does not, in both suites."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from freezevectors import load_peers
from hypothesis import given
from hypothesis import strategies as st
from linklab import Peers, new_peers

from tidegate.errors import RequestError, SealError
from tidegate.link.chunks import (
    CHUNK_MULTIPLE,
    LENGTH_BYTES,
    REQUEST_BUCKETS,
    padded_chunk_bytes,
    padded_request_bytes,
)
from tidegate.link.envelope import (
    DeviceAttempt,
    GatewayAttempt,
    new_request_id,
    request_time_ms,
)
from tidegate.link.suites import HYBRID, SUITES
from tidegate.link.wire import (
    CHUNK_HEAD,
    FRAGMENT_BYTES,
    HEADER,
    MAX_BODY_BYTES,
    MAX_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    OPENING,
    WHO_ANSWERS,
)

VECTORS = [
    json.loads((Path(__file__).parent / "vectors" / f"envelope_v1_suite{n}.json").read_text())
    for n in SUITES
]
PEERS = new_peers()
BOTH = [PEERS, new_peers(HYBRID)]
TAG_BYTES = 16
SIGNED_HEAD_BYTES = CHUNK_HEAD.size + WHO_ANSWERS.size

both_suites = pytest.mark.parametrize("peers", BOTH, ids=["X25519", "hybrid"])
every_vector = pytest.mark.parametrize("vector", VECTORS, ids=["X25519", "hybrid"])


def open_frozen(vector: dict[str, Any]) -> GatewayAttempt:
    peers = load_peers(vector)
    private = bytes.fromhex(vector["response_private"])
    message = bytes.fromhex(vector["request"])
    return peers.open(message, new_key=lambda: X25519PrivateKey.from_private_bytes(private))


@every_vector
def test_the_frozen_request_still_opens(vector: dict[str, Any]) -> None:
    opened = open_frozen(vector)
    assert opened.body.hex() == vector["body"]
    assert opened.device_id.hex() == vector["device_id"]
    assert opened.request_id.hex() == vector["request_id"]
    assert opened.attempt == vector["attempt"]


@every_vector
def test_the_frozen_answer_is_sealed_to_the_same_bytes_and_its_control_opens(
    vector: dict[str, Any],
) -> None:
    opened = open_frozen(vector)
    sealed = 0
    for step in vector["steps"]:
        if "control" in step:
            assert opened.open_control(bytes.fromhex(step["control"])).hex() == step["data"]
            continue
        message = opened.seal_response(bytes.fromhex(step["data"]), final=step["final"])
        assert message.hex() == step["answer"]
        sealed += 1
    assert sealed == 4


@every_vector
def test_the_frozen_prekey_still_has_the_same_public_half(vector: dict[str, Any]) -> None:
    assert load_peers(vector).prekey.public.raw.hex() == vector["prekey_public"]


@both_suites
def test_a_request_and_its_answer_go_through(peers: Peers) -> None:
    message, device = peers.seal(b"what is the tide?")
    gateway = peers.open(message)
    assert gateway.body == b"what is the tide?"
    assert device.open_response(gateway.seal_response(b"rising", final=False)) == (
        0,
        False,
        b"rising",
    )
    assert device.open_response(gateway.seal_response(b"", final=True)) == (1, True, b"")
    assert gateway.open_control(device.seal_control(b"thanks")) == b"thanks"


def test_the_error_says_nothing_about_the_cause() -> None:
    message, _ = PEERS.seal(b"secret")
    texts = set()
    for damaged in (b"", message[:-1], message[:40] + b"x" + message[41:], b"\x09" * 400):
        with pytest.raises(SealError) as caught:
            PEERS.open(damaged)
        texts.add(str(caught.value))
        assert caught.value.__cause__ is None
    assert texts == {"message could not be opened"}


def test_no_repr_shows_a_key_or_a_body() -> None:
    message, device = PEERS.seal(b"secret")
    partial, gateway = PEERS.open_first(message), PEERS.open(message)
    shown = repr(device) + repr(partial) + repr(gateway)
    assert "secret" not in shown
    shown_fields = {
        one.name for end in (device, partial, gateway) for one in fields(end) if one.repr
    }
    assert shown_fields == {"request_id", "attempt", "handle", "device_id", "body_bytes"}
    assert PEERS.prekey.raw.hex() not in repr(PEERS.prekey)
    assert repr(PEERS.prekey.raw) not in repr(PEERS.prekey)


def test_an_answer_says_who_answers_until_the_device_has_been_heard() -> None:
    message, device = PEERS.seal(b"a")
    gateway = PEERS.open(message)
    first, second = (
        gateway.seal_response(b"1", final=False),
        gateway.seal_response(b"2", final=False),
    )
    assert len(first) == len(second) == SIGNED_HEAD_BYTES + CHUNK_MULTIPLE + TAG_BYTES
    assert device.open_response(second)[2] == b"2"
    gateway.open_control(device.seal_control(b"seen"))
    third = gateway.seal_response(b"3", final=True)
    assert len(third) == CHUNK_HEAD.size + CHUNK_MULTIPLE + TAG_BYTES
    assert device.open_response(third) == (2, True, b"3")
    assert device.open_response(first) == (0, False, b"1")


def test_a_chunk_that_does_not_say_who_answers_opens_only_after_one_that_does() -> None:
    message, device = PEERS.seal(b"a")
    gateway = PEERS.open(message)
    opening = gateway.seal_response(b"1", final=False)
    gateway.open_control(device.seal_control(b"too early"))
    bare = gateway.seal_response(b"2", final=False)
    with pytest.raises(SealError):
        device.open_response(bare)
    device.open_response(opening)
    assert device.open_response(bare)[2] == b"2"


@both_suites
def test_whoever_stole_a_prekey_cannot_answer_in_the_gateways_place(peers: Peers) -> None:
    message, device = peers.seal(b"a")
    thief = Peers(
        prekey=peers.prekey,
        device_key=peers.device_key,
        gateway_key=Ed25519PrivateKey.generate(),
    )
    with pytest.raises(SealError):
        device.open_response(thief.open(message).seal_response(b"lies", final=True))
    answer = peers.open(message).seal_response(b"truth", final=True)
    assert device.open_response(answer)[2] == b"truth"


def test_a_filler_opens_as_no_data_and_counts_as_a_chunk() -> None:
    message, device = PEERS.seal(b"a")
    gateway = PEERS.open(message)
    filler = gateway.seal_response(b"", final=False, at_least_bytes=512)
    real = gateway.seal_response(b"rising", final=False, at_least_bytes=512)
    assert len(filler) == len(real) == SIGNED_HEAD_BYTES + 512 + TAG_BYTES
    assert device.open_response(filler) == (0, False, b"")
    assert device.open_response(real) == (1, False, b"rising")
    gateway.open_control(device.seal_control(b"heard"))
    assert len(gateway.seal_response(b".", final=True, at_least_bytes=512)) == len(real)


@given(st.integers(0, FRAGMENT_BYTES))
def test_a_request_is_padded_to_the_least_bucket_that_holds_it(data_bytes: int) -> None:
    padded = padded_request_bytes(data_bytes)
    assert padded == min(one for one in REQUEST_BUCKETS if one >= LENGTH_BYTES + data_bytes)


@pytest.mark.parametrize(
    ("data_bytes", "padded_bytes"),
    [(1, 256), (252, 256), (253, 1024), (4093, 16384), (65532, 65536)],
)
def test_requests_come_in_few_sizes(data_bytes: int, padded_bytes: int) -> None:
    assert padded_request_bytes(data_bytes) == padded_bytes


def test_more_than_a_bucket_is_no_chunk() -> None:
    with pytest.raises(ValueError, match="65532"):
        padded_request_bytes(FRAGMENT_BYTES + 1)


@given(st.integers(0, 100_000), st.integers(0, 5000))
def test_a_chunk_is_padded_to_the_least_multiple_that_holds_it(data_bytes: int, least: int) -> None:
    padded = padded_chunk_bytes(data_bytes, least)
    needed = max(LENGTH_BYTES + data_bytes, least)
    assert padded % CHUNK_MULTIPLE == 0
    assert needed <= padded < needed + CHUNK_MULTIPLE


@both_suites
def test_a_body_that_fills_its_bucket_to_the_byte_stays_in_it(peers: Peers) -> None:
    body = bytes(256 - LENGTH_BYTES - OPENING.size)
    message, _ = peers.seal(body)
    clear_bytes = 1 + HEADER.size + SUITES[peers.prekey.public.suite].wrap_bytes + 1
    assert len(message) == clear_bytes + 256 + TAG_BYTES
    assert peers.open(message).body == body


@both_suites
def test_the_largest_body_goes_through_in_messages_of_at_most_96_kib(peers: Peers) -> None:
    body = bytes(range(256)) * (MAX_BODY_BYTES // 256) + bytes(MAX_BODY_BYTES % 256)
    messages, _ = peers.seal_all(body)
    assert len(messages) == 16
    assert max(map(len, messages)) <= 96 * 1024
    assert peers.open(*messages).body == body


def test_a_body_that_is_too_large_is_refused_with_the_limit() -> None:
    with pytest.raises(RequestError, match=str(MAX_BODY_BYTES)) as caught:
        PEERS.seal(bytes(MAX_BODY_BYTES + 1))
    assert caught.value.status == 413


def test_the_largest_chunk_of_an_answer_fits_into_96_kib() -> None:
    device, gateway = new_pair()
    data = bytes(MAX_CHUNK_BYTES - LENGTH_BYTES)
    message = gateway.seal_response(data, final=True)
    assert 96 * 1024 - CHUNK_MULTIPLE < len(message) <= MAX_MESSAGE_BYTES == 96 * 1024
    assert device.open_response(message)[2] == data


def test_a_message_over_the_limit_is_refused_before_it_is_looked_at() -> None:
    message, device = PEERS.seal(b"a")
    gateway = PEERS.open(message)
    with pytest.raises(SealError):
        PEERS.open(message + bytes(1_000_000))
    with pytest.raises(SealError):
        device.open_response(gateway.seal_response(b"", final=False) + bytes(200_000))
    with pytest.raises(SealError):
        gateway.open_control(device.seal_control(b"") + bytes(200_000))


@given(st.integers(0, 700))
def test_answers_of_like_length_look_alike(data_bytes: int) -> None:
    _, gateway = new_pair()
    message = gateway.seal_response(bytes(data_bytes), final=False)
    assert (len(message) - SIGNED_HEAD_BYTES - TAG_BYTES) % CHUNK_MULTIPLE == 0


def new_pair() -> tuple[DeviceAttempt, GatewayAttempt]:
    message, device = PEERS.seal(b"a")
    return device, PEERS.open(message)


def test_a_request_id_tells_when_it_was_made() -> None:
    assert request_time_ms(new_request_id(1_800_000_000_123)) == 1_800_000_000_123
    assert len({new_request_id(1) for _ in range(100)}) == 100
