"""The device's side of enrolment: keys are made here, and nothing secret ever leaves.

What is under way is kept in `enrolling/`, so that a device which dies, or whose answer was lost,
goes on with the very request it has sent: the gateway repeats its answer to that one only.
`device.key` is written last, so a folder has a device or none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tidegate.errors import IdentityError
from tidegate.link import statements
from tidegate.link.certificates import make_request
from tidegate.link.certificates_store import BROKER_CA, BROKER_CERTIFICATE, BROKER_KEY, FACTS
from tidegate.link.enrolment import Granted, NewKeys, Token, open_answer, seal_request
from tidegate.link.identity import DeviceIdentity, load_device
from tidegate.link.keyfiles import read_public, read_secret, write_atomic

_UNDER_WAY = "enrolling"


def begin(folder: Path, token: Token) -> bytes:
    """Make the device's keys, or take up what was begun with this token; returns the request.

    Raises:
        IdentityError: there is a device already, or an enrolment with another token.
    """
    if (folder / "device.key").exists():
        raise IdentityError(f"{folder}: already has a device")
    under_way = folder / _UNDER_WAY
    if (under_way / "request").exists():
        _keys(under_way, token)
        return read_public(under_way / "request")
    csr_pem, tls_key_pem = make_request()
    keys = NewKeys(
        key=Ed25519PrivateKey.generate(),
        answer_key=X25519PrivateKey.generate(),
        tls_key_pem=tls_key_pem,
        csr_pem=csr_pem,
    )
    request = seal_request(token, keys)
    kept = {
        "token": token.token_id.hex(),
        "key": keys.key.private_bytes_raw().hex(),
        "answer_key": keys.answer_key.private_bytes_raw().hex(),
        "tls_key": tls_key_pem.decode("ascii"),
        "csr": csr_pem.decode("ascii"),
    }
    write_atomic(under_way / "secrets.json", json.dumps(kept).encode())
    write_atomic(under_way / "request", request)
    return request


def finish(folder: Path, token: Token, answer: bytes, *, now_s: float) -> Granted:
    """Verify the answer to what `begin` returned, and become that device.

    Raises:
        IdentityError: nothing was begun with this token, or the answer is not for us, not of this
            fleet, or this clock is far off. What was begun stays.
    """
    under_way = folder / _UNDER_WAY
    keys = _keys(under_way, token)
    request = read_public(under_way / "request")
    granted = open_answer(token, keys, request, answer, now_s=now_s)
    write_atomic(folder / FACTS, granted.facts)
    write_atomic(folder / BROKER_CA, granted.authorities_pem)
    write_atomic(folder / BROKER_CERTIFICATE, granted.certificate_pem)
    write_atomic(folder / BROKER_KEY, keys.tls_key_pem)
    fields = {
        "group": granted.group,
        "device_id": granted.device_id.hex(),
        "handle": granted.handle,
        "root": token.root.hex(),
    }
    write_atomic(folder / "device.json", json.dumps(fields, indent=2, sort_keys=True).encode())
    write_atomic(folder / "device.key", keys.key.private_bytes_raw())
    shutil.rmtree(under_way)
    return granted


def enrol(
    folder: Path, token: Token, send: Callable[[bytes], bytes], *, now_s: Callable[[], float]
) -> DeviceIdentity:
    """Begin, let `send` bring the request to the gateway and its answer back, finish.

    Raises:
        IdentityError: as `begin` and `finish`.
    """
    finish(folder, token, send(begin(folder, token)), now_s=now_s())
    return load_device(folder)


def _keys(under_way: Path, token: Token) -> NewKeys:
    """What was made for this token."""
    path = under_way / "secrets.json"
    if not path.exists():
        raise IdentityError(f"{under_way.parent}: no enrolment was begun here (tidegate enroll)")
    try:
        fields = json.loads(read_secret(path))
        if statements.hexadecimal(fields, "token", 16) != token.token_id:
            raise IdentityError(
                f"{under_way}: an enrolment with another token was begun; remove it to start anew"
            )
        return NewKeys(
            key=Ed25519PrivateKey.from_private_bytes(statements.hexadecimal(fields, "key", 32)),
            answer_key=X25519PrivateKey.from_private_bytes(
                statements.hexadecimal(fields, "answer_key", 32)
            ),
            tls_key_pem=statements.text(fields, "tls_key").encode("ascii"),
            csr_pem=statements.text(fields, "csr").encode("ascii"),
        )
    except (ValueError, AttributeError):
        raise IdentityError(f"{path}: damaged; remove {under_way} to start anew") from None


def fingerprint(root: bytes) -> str:
    """The root as people compare it: the first 16 bytes of its SHA-256, in groups."""
    digest = hashlib.sha256(root).hexdigest()[:32]
    return " ".join(digest[start : start + 4] for start in range(0, 32, 4))
