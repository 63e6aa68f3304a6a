"""A second decoder, written from docs/link-format.md alone, reads what this one writes."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from linkdecoder import Session, UndecodableError, ed25519_public
from linklab import Peers, new_peers

from tidegate.link.envelope import DeviceAttempt, GatewayAttempt, new_request_id
from tidegate.link.suites import SUITES
from tidegate.link.wire import FRAGMENT_BYTES, OPENING

SESSIONS = 1000
SOLO_BYTES = FRAGMENT_BYTES - OPENING.size
VECTORS = [
    json.loads((Path(__file__).parent / "vectors" / f"envelope_v1_suite{n}.json").read_text())
    for n in SUITES
]


@dataclass
class Captured:
    """What passed the broker, in its order, and what it meant."""

    request: list[bytes]
    body: bytes
    controls: list[tuple[bytes, bytes]]
    answer: list[tuple[bytes, bool, bytes]]


def body_bytes(rng: random.Random) -> int:
    """Mostly short, often at the edge of a bucket or of a chunk, now and then several chunks."""
    edge = rng.choice((252, 1020, 4092, 16380)) - OPENING.size
    several = SOLO_BYTES + rng.randrange(-2, 3) + rng.choice((0, 0, 1, 3)) * FRAGMENT_BYTES
    return rng.choices(
        (rng.randrange(300), max(0, edge + rng.randrange(-2, 3)), several), weights=(60, 35, 5)
    )[0]


def converse(rng: random.Random, device: DeviceAttempt, gateway: GatewayAttempt) -> Captured:
    """An answer of some chunks with controls in between, and each end reading the other."""
    captured = Captured(request=[], body=gateway.body, controls=[], answer=[])
    chunks = rng.randrange(1, 6)
    for n in range(chunks):
        data, final = rng.randbytes(rng.choice((0, 7, 60, 61, 200))), n == chunks - 1
        least = rng.choice((0, 0, 512))
        message = gateway.seal_response(data, final=final, at_least_bytes=least)
        assert device.open_response(message) == (n, final, data)
        captured.answer.append((message, final, data))
        if rng.random() < 0.4:
            said = rng.randbytes(16)
            control = device.seal_control(said)
            assert gateway.open_control(control) == said
            captured.controls.append((control, said))
    return captured


def reader(peers: Peers, response_key: X25519PrivateKey) -> Session:
    return Session(
        prekey_private=peers.prekey.raw,
        response_private=response_key.private_bytes_raw(),
        device_public=peers.device_key.public_key().public_bytes_raw(),
        gateway_public=peers.gateway_key.public_key().public_bytes_raw(),
        handle=peers.handle,
    )


def check(session: Session, captured: Captured) -> None:
    session.request(captured.request)
    assert session.body == captured.body
    for control, said in captured.controls:
        session.control(control)
        assert session.controls[-1] == said
    for n, (message, final, data) in enumerate(captured.answer):
        session.response(message)
        assert session.answer[-1] == (n, final, data)


def test_a_second_decoder_agrees_on_a_thousand_random_sessions() -> None:
    rng = random.Random(0)
    peers = [new_peers(suite) for suite in SUITES]
    several = signed = bare = controls = 0
    for number in range(SESSIONS):
        own, response_key = peers[number % len(peers)], X25519PrivateKey.generate()
        body = rng.randbytes(body_bytes(rng))
        attempt = rng.choice((0, 1, 7, 65535))
        request_id = new_request_id(1_800_000_000_000 + number)
        messages, device = own.seal_all(body, request_id=request_id, attempt=attempt)
        gateway = own.open(*messages, new_key=lambda key=response_key: key)  # type: ignore[misc]
        captured = converse(rng, device, gateway)
        captured.request = messages
        session = reader(own, response_key)
        check(session, captured)
        assert captured.body == body
        assert (session.request_id, session.attempt) == (request_id, attempt)
        assert session.device_id == own.device_id
        several += len(messages) > 1
        signed += sum(bool(message[27] & 2) for message, _, _ in captured.answer)
        bare += sum(not message[27] & 2 for message, _, _ in captured.answer)
        controls += len(captured.controls)
    assert several >= 20
    assert min(signed, bare, controls) >= 500


@pytest.mark.parametrize("vector", VECTORS, ids=["X25519", "hybrid"])
def test_a_second_decoder_reads_the_frozen_vectors(vector: dict[str, Any]) -> None:
    session = Session(
        prekey_private=bytes.fromhex(vector["prekey_private"]),
        response_private=bytes.fromhex(vector["response_private"]),
        device_public=ed25519_public(bytes.fromhex(vector["device_private"])),
        gateway_public=ed25519_public(bytes.fromhex(vector["gateway_private"])),
        handle=vector["handle"],
    )
    session.request([bytes.fromhex(vector["request"])])
    assert session.body.hex() == vector["body"]
    for step in vector["steps"]:
        if "control" in step:
            session.control(bytes.fromhex(step["control"]))
        else:
            session.response(bytes.fromhex(step["answer"]))
            assert session.answer[-1][1:] == (step["final"], bytes.fromhex(step["data"]))
    assert (len(session.controls), len(session.answer)) == (1, 4)


def test_the_second_decoder_notices_what_is_wrong() -> None:
    peers, response_key = new_peers(), X25519PrivateKey.generate()
    message, device = peers.seal(b"x")
    gateway = peers.open(message, new_key=lambda: response_key)
    session = reader(peers, response_key)
    with pytest.raises(UndecodableError):
        session.request([b"\x02" + message[1:]])
    with pytest.raises(InvalidTag):
        session.request([message[:-1] + bytes((message[-1] ^ 1,))])
    session.request([message])
    second = (device.seal_control(b"1"), device.seal_control(b"2"))[1]
    with pytest.raises(UndecodableError, match="count from 0"):
        session.control(second)
    answer = gateway.seal_response(b"1", final=True)
    with pytest.raises(InvalidTag):
        session.response(answer[:27] + b"\x02" + answer[28:])
