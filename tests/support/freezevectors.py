"""Makes the frozen vectors of the envelope; only a new format needs new ones.

`python freezevectors.py FOLDER`. Sealing is random, so a vector is one session that was sealed
once, with every key in it.
"""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from linklab import PREKEY_ID, Peers, new_peers

from tidegate.link.envelope import DeviceAttempt, DeviceId, GatewayAttempt, new_request_id
from tidegate.link.suites import SUITES, PrivatePrekey

SHORT = b"When is high water at noon's harbour?"


def answers(gateway: GatewayAttempt, device: DeviceAttempt) -> list[dict[str, Any]]:
    """Two signed chunks, a control, then two that are not signed: a filler, and the last one."""
    steps: list[dict[str, Any]] = []
    for data, final in ((b"At ", False), (b"twelve", False), (b"", False), (b".", True)):
        if len(steps) == 2:
            control = device.seal_control(b"\x01seen two")
            assert gateway.open_control(control) == b"\x01seen two"
            steps.append({"control": control.hex(), "data": b"\x01seen two".hex()})
        message = gateway.seal_response(data, final=final)
        steps.append({"answer": message.hex(), "data": data.hex(), "final": final})
    return steps


def freeze(suite: int) -> dict[str, Any]:
    fresh = new_peers(suite)
    peers = Peers(
        prekey=fresh.prekey,
        device_key=fresh.device_key,
        gateway_key=fresh.gateway_key,
        device_id=DeviceId(secrets.token_bytes(16)),
        handle=secrets.token_hex(16),
    )
    response = X25519PrivateKey.generate()
    message, device = peers.seal(SHORT, request_id=new_request_id(1_763_750_000_000), attempt=3)
    gateway = peers.open(message, new_key=lambda: response)
    return {
        "comment": f"Envelope version 1, suite {suite}. Frozen: a change is a new wire version.",
        "suite": suite,
        "prekey_id": PREKEY_ID.hex(),
        "prekey_private": peers.prekey.raw.hex(),
        "prekey_public": peers.prekey.public.raw.hex(),
        "device_private": peers.device_key.private_bytes_raw().hex(),
        "gateway_private": peers.gateway_key.private_bytes_raw().hex(),
        "response_private": response.private_bytes_raw().hex(),
        "device_id": peers.device_id.hex(),
        "handle": peers.handle,
        "request_id": device.request_id.hex(),
        "attempt": device.attempt,
        "body": SHORT.hex(),
        "request": message.hex(),
        "steps": answers(gateway, device),
    }


def load_peers(vector: dict[str, Any]) -> Peers:
    """The keys of a frozen session."""
    return Peers(
        prekey=PrivatePrekey.load(vector["suite"], bytes.fromhex(vector["prekey_private"])),
        device_key=Ed25519PrivateKey.from_private_bytes(bytes.fromhex(vector["device_private"])),
        gateway_key=Ed25519PrivateKey.from_private_bytes(bytes.fromhex(vector["gateway_private"])),
        device_id=DeviceId(bytes.fromhex(vector["device_id"])),
        handle=vector["handle"],
    )


if __name__ == "__main__":
    for number in SUITES:
        path = Path(sys.argv[1]) / f"envelope_v1_suite{number}.json"
        path.write_text(json.dumps(freeze(number), indent=1) + "\n", encoding="utf-8")
