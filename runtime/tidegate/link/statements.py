"""Signed statements: Ed25519 over a label and canonical JSON. Nothing is parsed before it verifies.

Layout: signature[64] | JSON with sorted keys, no spaces, ASCII. The label says what kind of
statement it is, so a signature made for one purpose never passes for another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tidegate.errors import IdentityError

SIGNATURE_BYTES = 64
MOST = 2**53 - 1
"""The largest number that every reader of JSON agrees on (RFC 8259, section 6)."""


def canonical_json(fields: Mapping[str, object]) -> bytes:
    """The one encoding of `fields` that is ever signed."""
    text = json.dumps(
        fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


def sign(key: Ed25519PrivateKey, label: str, fields: Mapping[str, object]) -> bytes:
    """Sign `fields` as a statement of the kind `label`."""
    data = canonical_json(fields)
    return key.sign(_labelled(label, data)) + data


def verify(key: Ed25519PublicKey, label: str, statement: bytes) -> dict[str, object]:
    """Check the signature, then parse.

    Raises:
        IdentityError: not signed by `key` as a `label`.
    """
    data = statement[SIGNATURE_BYTES:]
    try:
        key.verify(statement[:SIGNATURE_BYTES], _labelled(label, data))
        fields = json.loads(data)
    except InvalidSignature as error:
        raise IdentityError(f"{label}: signature does not match the pinned key") from error
    except (ValueError, RecursionError) as error:
        # Signed by the right key, and still nothing that may stop us.
        raise IdentityError(f"{label}: must be JSON") from error
    if not isinstance(fields, dict):
        raise IdentityError(f"{label}: must be a JSON object")
    return fields


def _labelled(label: str, data: bytes) -> bytes:
    return b"tidegate/1 " + label.encode("ascii") + b"\0" + data


def text(fields: Mapping[str, object], name: str) -> str:
    """Field `name` as a string.

    Raises:
        IdentityError: it is missing or of another type; so do the other readers here.
    """
    value = fields.get(name)
    if not isinstance(value, str):
        raise IdentityError(f"{name}: must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise IdentityError(f"{name}: must be text that UTF-8 can write") from error
    return value


def integer(fields: Mapping[str, object], name: str) -> int:
    """Field `name` as an integer from 0 to `MOST`."""
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
        raise IdentityError(f"{name}: must be an integer from 0 to {MOST}")
    return value


def number(fields: Mapping[str, object], name: str) -> float:
    """Field `name` as a finite float."""
    value = fields.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= MOST:
        raise IdentityError(f"{name}: must be a number of at most {MOST}")
    return float(value)


def hexadecimal(fields: Mapping[str, object], name: str, length_bytes: int) -> bytes:
    """Field `name` as exactly `length_bytes` bytes written in hex."""
    try:
        value = bytes.fromhex(text(fields, name))
    except ValueError as error:
        raise IdentityError(f"{name}: must be hexadecimal") from error
    if len(value) != length_bytes:
        raise IdentityError(f"{name}: {len(value)} bytes: must be {length_bytes}")
    return value


def items(fields: Mapping[str, object], name: str, *, most: int) -> list[object]:
    """Field `name` as a list of at most `most` items."""
    value = fields.get(name)
    if not isinstance(value, list) or len(value) > most:
        raise IdentityError(f"{name}: must be a list of at most {most}")
    return value
