"""Who is who: fleet root, gateway signing keys, device keys, and the gateway's device registry.

The fleet root (Ed25519, kept offline) signs a gateway's key; a device pins the root. A device is
known to its gateways by a random id that only travels encrypted, and to the broker by a random
handle that is not derived from it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tidegate.errors import CapacityError, IdentityError
from tidegate.link import statements
from tidegate.link.envelope import DeviceId
from tidegate.link.keyfiles import read_key, read_public
from tidegate.link.topics import check_name

CERTIFICATE_LABEL = "gateway certificate"
HANDLE_CHARACTERS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceIdentity:
    """Everything a device needs to be itself."""

    group: str
    device_id: DeviceId
    handle: str
    key: Ed25519PrivateKey = field(repr=False)
    root: Ed25519PublicKey = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayIdentity:
    """A gateway's signing key and the root's statement about it."""

    group: str
    gateway_id: str
    key: Ed25519PrivateKey = field(repr=False)
    certificate: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayCertificate:
    """The root's statement: this key speaks for this gateway until `naf_s` (Unix time)."""

    group: str
    gateway_id: str
    key: Ed25519PublicKey
    nbf_s: int
    naf_s: int


def open_certificate(root: Ed25519PublicKey, certificate: bytes) -> GatewayCertificate:
    """Verify a gateway certificate against the pinned root.

    Raises:
        IdentityError: not signed by this root, or malformed.
    """
    fields = statements.verify(root, CERTIFICATE_LABEL, certificate)
    return GatewayCertificate(
        group=statements.text(fields, "group"),
        gateway_id=statements.text(fields, "gateway"),
        key=Ed25519PublicKey.from_public_bytes(statements.hexadecimal(fields, "key", 32)),
        nbf_s=statements.integer(fields, "nbf"),
        naf_s=statements.integer(fields, "naf"),
    )


def load_device(directory: Path) -> DeviceIdentity:
    """Load what `fleet.add_device` wrote.

    Raises:
        IdentityError: a file is missing, damaged or readable by others.
    """
    fields = _json(directory / "device.json")
    handle = statements.text(fields, "handle")
    return DeviceIdentity(
        group=check_name("device.json group", statements.text(fields, "group")),
        device_id=DeviceId(statements.hexadecimal(fields, "device_id", 16)),
        handle=check_name("device.json handle", handle),
        key=Ed25519PrivateKey.from_private_bytes(read_key(directory / "device.key")),
        root=Ed25519PublicKey.from_public_bytes(statements.hexadecimal(fields, "root", 32)),
    )


def load_gateway(directory: Path) -> GatewayIdentity:
    """Load what `fleet.add_gateway` wrote.

    Raises:
        IdentityError: a file is missing, damaged or readable by others.
    """
    fields = _json(directory / "gateway.json")
    return GatewayIdentity(
        group=check_name("gateway.json group", statements.text(fields, "group")),
        gateway_id=check_name("gateway.json gateway", statements.text(fields, "gateway")),
        key=Ed25519PrivateKey.from_private_bytes(read_key(directory / "gateway.key")),
        certificate=read_public(directory / "gateway.cert"),
    )


def _json(path: Path) -> Mapping[str, object]:
    try:
        fields = json.loads(read_public(path))
    except ValueError as error:
        raise IdentityError(f"{path}: must be JSON") from error
    if not isinstance(fields, dict):
        raise IdentityError(f"{path}: must be a JSON object")
    return fields


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRecord:
    """One registered device."""

    device_id: DeviceId
    handle: str
    public_key: bytes
    revoked: bool


class DeviceRegistry:
    """The gateway's list of devices, one SQLite file.

    Every request looks its sender up again, so a revocation written by another process holds from
    the next message on.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = path
        try:
            with closing(self._open()) as db:
                db.execute(
                    "CREATE TABLE IF NOT EXISTS devices (device_id BLOB PRIMARY KEY, handle TEXT"
                    " NOT NULL UNIQUE, public_key BLOB NOT NULL, revoked INTEGER NOT NULL)"
                )
            path.chmod(0o600)
            self._db = self._open()
        except sqlite3.Error as error:
            raise IdentityError(f"{path}: cannot be used as a registry ({error})") from error

    def _open(self) -> sqlite3.Connection:
        # One connection, used by one thread at a time (the gateway's core thread).
        return sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)

    def add(self, record: DeviceRecord) -> None:
        """Register a device, or replace what is known of it.

        Raises:
            CapacityError: the file cannot be written.
        """
        self._execute(
            "INSERT OR REPLACE INTO devices VALUES (?, ?, ?, ?)",
            record.device_id,
            record.handle,
            record.public_key,
            record.revoked,
        )

    def revoke(self, device_id: DeviceId) -> None:
        """Refuse everything from this device from now on.

        Raises:
            IdentityError: no such device.
            CapacityError: the file cannot be written.
        """
        row = self._execute("UPDATE devices SET revoked = 1 WHERE device_id = ?", device_id)
        if row.rowcount != 1:
            raise IdentityError(f"device {device_id.hex()}: not registered here")

    def find(self, device_id: DeviceId) -> DeviceRecord | None:
        """The record of `device_id`, revoked or not.

        Raises:
            CapacityError: the file cannot be read.
        """
        row = self._execute(
            "SELECT handle, public_key, revoked FROM devices WHERE device_id = ?", device_id
        ).fetchone()
        if row is None:
            return None
        return DeviceRecord(
            device_id=device_id, handle=row[0], public_key=row[1], revoked=bool(row[2])
        )

    def _execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise CapacityError(f"{self._path}: the registry cannot be used ({error})") from error

    def close(self) -> None:
        self._db.close()
