"""A device's signing key and the one after it: statements, and which key a gateway goes by.

A succession is signed by both keys, so that nobody else's key can be slipped in and nobody can
claim a key that it has not. For a while both keys are good; a confirmation by the new key, which
the device gives only when the new key is safe on its disk, ends the old one::

    succession    signature[64] of the new key | statement of the old key, label "device key"
    confirmation  statement of the new key, label "device key in use"
    history       (succession_bytes u16 | succession) ...                          oldest first

A history lets another gateway follow from the key that it knows to the newest one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tidegate.errors import IdentityError
from tidegate.link import statements
from tidegate.link.envelope import DeviceId
from tidegate.link.registry import DeviceRecord
from tidegate.link.statements import SIGNATURE_BYTES

MOST_SUCCESSIONS = 16
"""In a history; a gateway that has missed more is told by enrolling anew."""
MOST_SUCCESSION_BYTES = 1024
_LABEL, _IN_USE = "device key", "device key in use"
_TAKEN = b"tidegate/1 device key taken\0"
_KEY_BYTES = 32


def succession(old: Ed25519PrivateKey, new: Ed25519PrivateKey, device_id: DeviceId) -> bytes:
    """That `new` comes after `old`, said by both."""
    fields = {
        "device": device_id.hex(),
        "old": old.public_key().public_bytes_raw().hex(),
        "new": new.public_key().public_bytes_raw().hex(),
    }
    said = statements.sign(old, _LABEL, fields)
    return new.sign(_TAKEN + said) + said


def open_succession(proof: bytes, device_id: DeviceId, old: bytes) -> bytes:
    """The key that comes after `old`.

    Raises:
        IdentityError: it is another device's or another key's, or one of the two has not signed.
    """
    said = proof[SIGNATURE_BYTES:]
    fields = statements.verify(Ed25519PublicKey.from_public_bytes(old), _LABEL, said)
    named = statements.hexadecimal(fields, "device", 16), statements.hexadecimal(fields, "old", 32)
    new = statements.hexadecimal(fields, "new", _KEY_BYTES)
    if named != (device_id, old) or new == old:
        raise IdentityError("device key: is another device's or key's succession")
    try:
        key = Ed25519PublicKey.from_public_bytes(new)
        key.verify(proof[:SIGNATURE_BYTES], _TAKEN + said)
    except (InvalidSignature, ValueError):
        raise IdentityError("device key: the new key has not signed") from None
    return new


def confirmation(new: Ed25519PrivateKey, device_id: DeviceId) -> bytes:
    """That the device has `new` on its disk and signs with it."""
    return statements.sign(new, _IN_USE, {"device": device_id.hex()})


def _confirmed(said: bytes, device_id: DeviceId, key: bytes) -> bool:
    try:
        fields = statements.verify(Ed25519PublicKey.from_public_bytes(key), _IN_USE, said)
        return statements.hexadecimal(fields, "device", 16) == device_id
    except IdentityError:
        return False


def registered(record: DeviceRecord, proof: bytes) -> DeviceRecord:
    """`record` with the key that `proof` says comes next; the same when it has it already.

    A key that was to come next and was never confirmed gives way.

    Raises:
        IdentityError: the device's key has not signed `proof`.
    """
    past = list(successions(record.history))
    if past and past[-1] == proof:
        return record
    new = open_succession(proof, record.device_id, record.public_key)
    if record.next_key is not None:
        past.pop()
    return replace(record, next_key=new, history=_joined([*past, proof]))


def confirmed(record: DeviceRecord, said: bytes) -> DeviceRecord:
    """`record` with its next key as its only one; the same when it is already.

    Raises:
        IdentityError: neither key has said that it is in use.
    """
    if _confirmed(said, record.device_id, record.public_key):
        return record
    if record.next_key is None or not _confirmed(said, record.device_id, record.next_key):
        raise IdentityError("device key: was not registered before it was confirmed")
    return replace(record, public_key=record.next_key, next_key=None)


def merged_keys(ours: DeviceRecord, theirs: DeviceRecord) -> DeviceRecord:
    """`ours` with the newer keys of the two, where one follows from the other by its history.

    Raises:
        IdentityError: they are keys of which neither follows from the other.
    """
    known = [ours.public_key, *_after(ours.public_key, theirs)]
    if theirs.public_key in known:
        newer = theirs.public_key != ours.public_key or ours.next_key is None
        reached = theirs.next_key is None or theirs.next_key in known
        if newer and reached:
            return replace(
                ours,
                public_key=theirs.public_key,
                next_key=theirs.next_key,
                history=theirs.history,
            )
        return ours
    if ours.public_key in _after(theirs.public_key, ours):
        return ours
    raise IdentityError(f"device list: handle {theirs.handle}: is known here with another key")


def successions(history: bytes) -> Iterator[bytes]:
    """The successions of a history, oldest first; what is cut off is left out."""
    at = 0
    while at + 2 <= len(history):
        end = at + 2 + int.from_bytes(history[at : at + 2], "big")
        yield history[at + 2 : end]
        at = end


def _after(key: bytes, record: DeviceRecord) -> list[bytes]:
    """The keys that follow from `key` by the history of `record`."""
    found: list[bytes] = []
    for proof in successions(record.history):
        try:
            key = open_succession(proof, record.device_id, key)
        except IdentityError:
            continue
        found.append(key)
    return found


def _joined(proofs: list[bytes]) -> bytes:
    kept = proofs[-MOST_SUCCESSIONS:]
    return b"".join(len(proof).to_bytes(2, "big") + proof for proof in kept)
