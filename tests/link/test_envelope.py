"""The envelope: what opens, and that everything else does not."""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from dataclasses import fields
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st
from linklab import HANDLE, Peers, new_peers

from tidegate.errors import RequestError, SealError
from tidegate.link.chunks import CHUNK_MULTIPLE, padded_request_bytes
from tidegate.link.envelope import (
    MAX_BODY_BYTES,
    DeviceId,
    GatewayAttempt,
    MessageType,
    RequestId,
    new_request_id,
    open_request,
    request_time_ms,
    route,
)

VECTORS = json.loads((Path(__file__).parent / "vectors" / "envelope_v1.json").read_text())
PEERS = new_peers()
CLEAR_REQUEST_BYTES = 1 + 30 + 80
TAG_BYTES = 16


def frozen(name: str) -> bytes:
    return bytes.fromhex(VECTORS[name])


def frozen_peers() -> Peers:
    return Peers(
        prekey=X25519PrivateKey.from_private_bytes(frozen("prekey_private")),
        device_key=Ed25519PrivateKey.from_private_bytes(frozen("device_private")),
        device_id=DeviceId(frozen("device_id")),
        handle=VECTORS["handle"],
    )


def open_frozen() -> GatewayAttempt:
    peers = frozen_peers()
    return open_request(
        frozen("request"),
        handle=peers.handle,
        find_prekey=lambda suite, prekey_id: peers.prekey,
        find_device=lambda device_id: peers.device_key.public_key(),
        new_key=lambda: X25519PrivateKey.from_private_bytes(frozen("response_private")),
    )


def test_the_frozen_request_still_opens() -> None:
    opened = open_frozen()
    assert opened.body == frozen("body")
    assert opened.device_id == frozen("device_id")
    assert opened.request_id == frozen("request_id")
    assert opened.attempt == VECTORS["attempt"]


def test_the_frozen_answer_is_sealed_to_the_same_bytes() -> None:
    opened = open_frozen()
    for chunk in VECTORS["responses"]:
        message = opened.seal_response(bytes.fromhex(chunk["data"]), final=chunk["final"])
        assert message.hex() == chunk["message"]


def test_the_frozen_controls_still_open() -> None:
    opened = open_frozen()
    for control in VECTORS["controls"]:
        assert opened.open_control(bytes.fromhex(control["message"])).hex() == control["data"]


def hkdf_extract(salt: bytes, secret: bytes) -> bytes:
    return hmac.digest(salt, secret, "sha256")


def hkdf_expand(root: bytes, info: bytes, length: int) -> bytes:
    """One block is enough for up to 32 bytes (RFC 5869 section 2.3)."""
    return hmac.digest(root, info + b"\x01", "sha256")[:length]


def open_chunk(root: bytes, direction: bytes, n: int, final: int, ciphertext: bytes) -> bytes:
    request_id = frozen("request_id")
    key = hkdf_expand(root, b"tidegate/1 key" + direction + request_id, 32)
    iv = hkdf_expand(root, b"tidegate/1 iv" + direction + request_id, 12)
    nonce = bytes(a ^ b for a, b in zip(iv, struct.pack(">4xQ", n), strict=True))
    place = struct.pack(">H", VECTORS["attempt"]) + VECTORS["handle"].encode()
    aad = b"tidegate/1" + direction + request_id + place + struct.pack(">QB", n, final)
    plaintext = ChaCha20Poly1305(key).decrypt(nonce, ciphertext, aad)
    (length,) = struct.unpack_from(">I", plaintext)
    assert not any(plaintext[4 + length :])
    return plaintext[4 : 4 + length]


def test_a_second_decoder_written_from_the_specification_agrees() -> None:
    message = frozen("request")
    header, wrap, chunk = message[1:31], message[31:111], message[111:]
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)
    info = b"tidegate/1 wrap" + hashlib.sha256(header).digest()
    secret = suite.decrypt(wrap, frozen_peers().prekey, info=info)
    transcript = hashlib.sha256(header + wrap).digest()
    content = open_chunk(hkdf_extract(transcript, secret), b"Q", 0, 1, chunk)
    device_id, ephemeral, signature = content[:16], content[16:48], content[48:112]
    body = content[112:]
    assert (device_id, body) == (frozen("device_id"), frozen("body"))
    signed = b"tidegate/1 sig" + transcript + ephemeral + hashlib.sha256(body).digest()
    frozen_peers().device_key.public_key().verify(signature, signed)
    response_key = X25519PrivateKey.from_private_bytes(frozen("response_private"))
    shared = response_key.exchange(X25519PublicKey.from_public_bytes(ephemeral))
    public = response_key.public_key().public_bytes_raw()
    salt = hashlib.sha256(transcript + public).digest()
    root = hkdf_extract(salt, secret + shared)
    for n, expected in enumerate(VECTORS["responses"]):
        answer = bytes.fromhex(expected["message"])
        assert answer[19:51] == public
        data = open_chunk(root, b"R", n, int(expected["final"]), answer[60:])
        assert data.hex() == expected["data"]


def test_a_request_and_its_answer_go_through() -> None:
    message, device = PEERS.seal(b"what is the tide?")
    gateway = PEERS.open(message)
    assert gateway.body == b"what is the tide?"
    assert device.open_response(gateway.seal_response(b"rising", final=False)) == (
        0,
        False,
        b"rising",
    )
    assert device.open_response(gateway.seal_response(b"", final=True)) == (1, True, b"")
    assert gateway.open_control(device.seal_control(b"thanks")) == b"thanks"


def every_flip(message: bytes) -> list[bytes]:
    return [
        message[:i] + bytes((message[i] ^ (1 << (i % 8)),)) + message[i + 1 :]
        for i in range(len(message))
    ]


def test_a_request_with_any_byte_flipped_does_not_open() -> None:
    message, _ = PEERS.seal(b"secret")
    for damaged in every_flip(message):
        with pytest.raises(SealError):
            PEERS.open(damaged)


def test_an_answer_with_any_byte_flipped_does_not_open() -> None:
    message, device = PEERS.seal(b"secret")
    gateway = PEERS.open(message)
    answer = gateway.seal_response(b"rising", final=True)
    for damaged in every_flip(answer):
        with pytest.raises(SealError):
            device.open_response(damaged)
    assert device.open_response(answer)[2] == b"rising"


def test_a_control_with_any_byte_flipped_does_not_open() -> None:
    message, device = PEERS.seal(b"secret")
    gateway = PEERS.open(message)
    control = device.seal_control(b"ack")
    for damaged in every_flip(control):
        with pytest.raises(SealError):
            gateway.open_control(damaged)
    assert gateway.open_control(control) == b"ack"


def test_a_message_cut_anywhere_does_not_open() -> None:
    message, device = PEERS.seal(b"secret")
    gateway = PEERS.open(message)
    answer = gateway.seal_response(b"rising", final=True)
    for length in range(len(message)):
        with pytest.raises(SealError):
            PEERS.open(message[:length])
    for length in range(len(answer)):
        with pytest.raises(SealError):
            device.open_response(answer[:length])


def test_a_request_opens_only_on_the_topic_of_its_device() -> None:
    message, _ = PEERS.seal(b"secret")
    with pytest.raises(SealError):
        PEERS.open(message, handle=HANDLE[::-1])


def test_a_request_from_an_unknown_or_revoked_device_does_not_open() -> None:
    message, _ = PEERS.seal(b"secret")
    with pytest.raises(SealError):
        open_request(
            message,
            handle=HANDLE,
            find_prekey=lambda suite, prekey_id: PEERS.prekey,
            find_device=lambda device_id: None,
        )


def test_a_request_signed_by_another_device_does_not_open() -> None:
    impostor = Peers(prekey=PEERS.prekey, device_key=Ed25519PrivateKey.generate())
    message, _ = impostor.seal(b"secret")
    with pytest.raises(SealError):
        PEERS.open(message)


def test_an_answer_to_one_attempt_does_not_open_in_another() -> None:
    request_id = new_request_id(1)
    first, first_keys = PEERS.seal(b"a", request_id=request_id, attempt=0)
    second, second_keys = PEERS.seal(b"a", request_id=request_id, attempt=1)
    answer = bytearray(PEERS.open(first).seal_response(b"rising", final=True))
    with pytest.raises(SealError):
        second_keys.open_response(bytes(answer))
    answer[17:19] = (1).to_bytes(2, "big")
    with pytest.raises(SealError):
        second_keys.open_response(bytes(answer))
    assert PEERS.open(second).attempt == first_keys.attempt + 1


def test_an_older_control_is_refused_after_a_newer_one() -> None:
    message, device = PEERS.seal(b"a")
    gateway = PEERS.open(message)
    older, newer = device.seal_control(b"1"), device.seal_control(b"2")
    assert gateway.open_control(newer) == b"2"
    for replayed in (older, newer):
        with pytest.raises(SealError):
            gateway.open_control(replayed)


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
    gateway = PEERS.open(message)
    shown = repr(device) + repr(gateway)
    assert "secret" not in shown
    shown_fields = {one.name for end in (device, gateway) for one in fields(end) if one.repr}
    assert shown_fields == {"request_id", "attempt", "handle", "device_id"}


@pytest.mark.parametrize(
    ("content_bytes", "padded_bytes"),
    [(1, 256), (256, 256), (257, 1024), (4097, 16384), (65536, 65536), (65537, 131072)],
)
def test_requests_come_in_few_sizes(content_bytes: int, padded_bytes: int) -> None:
    assert padded_request_bytes(content_bytes) == padded_bytes


def test_a_body_that_fills_its_bucket_to_the_byte_stays_in_it() -> None:
    message, _ = PEERS.seal(bytes(256 - 4 - 112))
    assert len(message) == CLEAR_REQUEST_BYTES + 256 + TAG_BYTES
    assert PEERS.open(message).body == bytes(256 - 4 - 112)


def test_the_largest_body_goes_through_in_less_than_a_megabyte() -> None:
    message, _ = PEERS.seal(bytes(MAX_BODY_BYTES))
    assert len(message) < 1_000_000
    assert len(PEERS.open(message).body) == MAX_BODY_BYTES


def test_a_body_that_is_too_large_is_refused_with_the_limit() -> None:
    with pytest.raises(RequestError, match=str(MAX_BODY_BYTES)) as caught:
        PEERS.seal(bytes(MAX_BODY_BYTES + 1))
    assert caught.value.status == 413


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
    _, gateway = sealed_pair()
    message = gateway.seal_response(bytes(data_bytes), final=False)
    assert (len(message) - 60 - TAG_BYTES) % CHUNK_MULTIPLE == 0


def sealed_pair() -> tuple[bytes, GatewayAttempt]:
    message, _ = PEERS.seal(b"a")
    return message, PEERS.open(message)


def test_a_request_id_tells_when_it_was_made() -> None:
    assert request_time_ms(new_request_id(1_800_000_000_123)) == 1_800_000_000_123
    assert len({new_request_id(1) for _ in range(100)}) == 100


@given(st.binary(max_size=200))
def test_any_bytes_are_routed_or_refused(data: bytes) -> None:
    try:
        where = route(data)
    except SealError:
        return
    assert where.kind in MessageType
    assert len(where.request_id) == 16


@given(st.binary(max_size=1200))
def test_any_bytes_behind_a_good_header_are_refused(data: bytes) -> None:
    message, device = PEERS.seal(b"a", request_id=RequestId(bytes(16)))
    gateway = PEERS.open(message)
    for head in (message[:31], message[:111], b""):
        with pytest.raises(SealError):
            PEERS.open(head + data)
    with pytest.raises(SealError):
        device.open_response(gateway.seal_response(b"", final=False)[:60] + data)
    with pytest.raises(SealError):
        gateway.open_control(device.seal_control(b"")[:27] + data)
