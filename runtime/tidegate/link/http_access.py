"""Who may use a handle over HTTP: what a device signs, and how often it counts.

    stream  signature over (group, gateway, handle, challenge): opens the handle's stream, once
    send    signature over (... , number, digest of the body): one body of that stream, once

The gateway makes the challenge, so no clock of a device is asked. What somebody else heard is worth
nothing a second time: a challenge opens one stream, and a number of a stream brings one body.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tidegate.errors import CapacityError, IdentityError
from tidegate.link import statements
from tidegate.link.identity import DeviceIdentity

PATH = "/tidegate/1"
"""Before `/challenge`, `/stream` and `/send`."""
SCHEME = "Tidegate"
"""Of the `Authorization` header: `Tidegate NAME.STATEMENT`, the statement in URL-safe Base64."""
CHALLENGE_BYTES = 16 + 8 + 16
CHALLENGE_S = 30.0
"""For the way back and forth, and the slowest signer."""
WINDOW = 256
"""How far the numbers of a stream may overtake each other (RFC 4303, section 3.4.3)."""

_STREAM, _SEND = "http stream", "http send"
_MOST_REDEEMED = 65536
_MOST_STATEMENT = 2048
_HEADER = re.compile(r"([A-Za-z0-9_-]{1,128})\.([A-Za-z0-9_-]{1,2752}={0,2})")


class Challenges:
    """Challenges that need no memory until they are met, each good for once and a short while.

    Times are monotonic seconds of the gateway.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._redeemed: dict[bytes, float] = {}

    def issue(self, now_s: float) -> bytes:
        """A fresh one."""
        head = secrets.token_bytes(16) + int((now_s + CHALLENGE_S) * 1000).to_bytes(8, "big")
        return head + self._mark(head)

    def check(self, now_s: float, challenge: bytes) -> None:
        """Refuse one that is not ours, too old or met.

        Raises:
            IdentityError: it is.
        """
        head, mark = challenge[:24], challenge[24:]
        known = len(challenge) == CHALLENGE_BYTES and hmac.compare_digest(self._mark(head), mark)
        if not known or _until_s(challenge) <= now_s or challenge in self._redeemed:
            raise IdentityError("challenge: is not ours, too old, or met already")

    def redeem(self, now_s: float, challenge: bytes) -> None:
        """It has been met: not again.

        Raises:
            IdentityError: as `check`.
            CapacityError: too many were met within `CHALLENGE_S`.
        """
        self.check(now_s, challenge)
        # Nearly in the order of their ends: one that blocks the others does so for `CHALLENGE_S`.
        while self._redeemed and self._redeemed[oldest := next(iter(self._redeemed))] <= now_s:
            del self._redeemed[oldest]
        if len(self._redeemed) >= _MOST_REDEEMED:
            raise CapacityError("http: too many streams opened lately")
        self._redeemed[challenge] = _until_s(challenge)

    def _mark(self, head: bytes) -> bytes:
        return hmac.digest(self._key, head, "sha256")[:16]


def _until_s(challenge: bytes) -> float:
    return int.from_bytes(challenge[16:24], "big") / 1000


class NumberWindow:
    """Which numbers have come: each counts once, and one far behind the highest never."""

    def __init__(self) -> None:
        self._highest = -1
        self._seen = 0

    def take(self, number: int) -> bool:
        """True for a number that has not come before."""
        ahead = number - self._highest
        if ahead > 0:
            # A jump beyond the window would shift by a number that a peer chose.
            kept = 0 if ahead >= WINDOW else self._seen << ahead
            self._seen = (kept | 1) & ((1 << WINDOW) - 1)
            self._highest = number
            return True
        if -ahead >= WINDOW or self._seen >> -ahead & 1:
            return False
        self._seen |= 1 << -ahead
        return True


def header(name: str, statement: bytes) -> str:
    """The `Authorization` header of a device."""
    return f"{SCHEME} {name}.{base64.urlsafe_b64encode(statement).decode('ascii')}"


def read_header(value: str) -> tuple[str, bytes]:
    """Name and statement of an `Authorization` header; nothing of it is verified.

    Raises:
        IdentityError: it is none of ours.
    """
    scheme, _, rest = value.partition(" ")
    match = _HEADER.fullmatch(rest)
    if scheme.lower() != SCHEME.lower() or match is None:
        raise IdentityError(f"Authorization: must be {SCHEME} NAME.STATEMENT")
    try:
        statement = base64.b64decode(match[2], altchars=b"-_", validate=True)
    except binascii.Error:
        raise IdentityError("Authorization: must be Base64") from None
    if len(statement) > _MOST_STATEMENT:
        raise IdentityError(f"Authorization: must be at most {_MOST_STATEMENT} bytes")
    return match[1], statement


def sign_stream(identity: DeviceIdentity, gateway_id: str, challenge: bytes) -> bytes:
    """A device's claim to its handle."""
    return statements.sign(
        identity.key, _STREAM, _fields(identity.group, gateway_id, identity.handle, challenge)
    )


def sign_send(
    identity: DeviceIdentity, gateway_id: str, challenge: bytes, *, number: int, body: bytes
) -> bytes:
    """A device's word for one body of the stream that `challenge` opened."""
    fields = _fields(identity.group, gateway_id, identity.handle, challenge)
    return statements.sign(identity.key, _SEND, {**fields, "number": number, "body": _digest(body)})


def verify_stream(key: Ed25519PublicKey, statement: bytes, expected: Mapping[str, object]) -> bytes:
    """Check a claim against what it must say; returns the challenge it meets.

    Args:
        key: of the device that the registry has under the handle.
        statement: what came.
        expected: `group`, `gateway` and `handle`.

    Raises:
        IdentityError: not signed by that device, or for something else.
    """
    fields = statements.verify(key, _STREAM, statement)
    _check(fields, expected)
    return statements.hexadecimal(fields, "challenge", CHALLENGE_BYTES)


def verify_send(
    key: Ed25519PublicKey, statement: bytes, expected: Mapping[str, object], *, body: bytes
) -> int:
    """Check the word for `body`; returns its number. `expected` has the `challenge` too, in hex.

    Raises:
        IdentityError: not signed by that device, or for something else.
    """
    fields = statements.verify(key, _SEND, statement)
    _check(fields, {**expected, "body": _digest(body)})
    return statements.integer(fields, "number")


def _fields(group: str, gateway_id: str, handle: str, challenge: bytes) -> dict[str, object]:
    return {
        "group": group,
        "gateway": gateway_id,
        "handle": handle,
        "challenge": challenge.hex(),
    }


def _check(fields: Mapping[str, object], expected: Mapping[str, object]) -> None:
    for name, value in expected.items():
        if fields.get(name) != value:
            raise IdentityError(f"http: {name} is another one")


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
