"""The gateway's look at who comes over HTTP: its registry decides, anew for every body.

Used by one thread at a time: it reads SQLite and verifies signatures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tidegate.errors import DeviceRefusedError, IdentityError
from tidegate.link.http_access import verify_send, verify_stream
from tidegate.link.identity import load_gateway
from tidegate.link.registry import DeviceRecord, DeviceRegistry

T = TypeVar("T")


class HttpDoor:
    """The devices of the gateway whose keys are in `folder`; works beside it on the same registry.

    Raises:
        IdentityError: the keys or the registry cannot be used.
    """

    def __init__(self, folder: Path, *, wall_s: Callable[[], float] = time.time) -> None:
        identity = load_gateway(folder)
        self.group, self.gateway_id = identity.group, identity.gateway_id
        self._registry = DeviceRegistry(folder / "devices.sqlite")
        self._wall_s = wall_s

    def close(self) -> None:
        self._registry.close()

    def open_stream(self, handle: str, statement: bytes) -> bytes:
        """Check a device's claim to `handle`; returns the challenge that it meets.

        Raises:
            IdentityError: nobody here has this handle, or the claim is another's.
            DeviceRefusedError: it was revoked or has expired.
            CapacityError: the registry cannot be read.
        """
        record = self._registry.find_handle(handle)
        expected = self._expected(handle)
        challenge = _first(record, lambda key: verify_stream(key, statement, expected))
        self._check(record)
        return challenge

    def take_send(self, handle: str, challenge: bytes, statement: bytes, body: bytes) -> int:
        """Check a device's word for a body of the stream of `challenge`; returns its number.

        Raises:
            IdentityError, DeviceRefusedError, CapacityError: as `open_stream`.
        """
        record = self._registry.find_handle(handle)
        expected = {**self._expected(handle), "challenge": challenge.hex()}
        number = _first(record, lambda key: verify_send(key, statement, expected, body=body))
        self._check(record)
        return number

    def refused(self, handles: Iterable[str]) -> dict[str, str]:
        """Those of `handles` that nothing is taken from any more, each with the reason's code.

        Raises:
            CapacityError: the registry cannot be read.
        """
        found = {handle: self._registry.find_handle(handle) for handle in handles}
        now_s = self._wall_s()
        return {
            handle: code
            for handle, record in found.items()
            if (code := "unknown" if record is None else record.refusal(now_s)) is not None
        }

    def _expected(self, handle: str) -> dict[str, object]:
        return {"group": self.group, "gateway": self.gateway_id, "handle": handle}

    def _check(self, record: DeviceRecord | None) -> None:
        """Only after the signature: whether a device was revoked is for itself to know."""
        code = None if record is None else record.refusal(self._wall_s())
        if code is not None:
            raise DeviceRefusedError(f"the gateway takes nothing from this device: {code}")


def _first(record: DeviceRecord | None, verify: Callable[[Ed25519PublicKey], T]) -> T:
    """What `verify` says with one of the device's keys: two while it changes to another."""
    problem = IdentityError("http: nobody has this handle")
    for key in () if record is None else record.keys:
        try:
            return verify(Ed25519PublicKey.from_public_bytes(key))
        except IdentityError as error:
            problem = error
    raise problem
