"""The gateway's devices and their certificates: one SQLite file, `devices.sqlite`.

Every message looks its sender up again, so a revocation written by another process holds from the
next one on. A revocation is never taken back: a device that returns enrols again, under a new id.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidegate.errors import CapacityError, IdentityError
from tidegate.link.clock import CLOCK_SKEW_S
from tidegate.link.envelope import DeviceId
from tidegate.link.sqlite_file import open_file, transaction

REVOKED = "device_revoked"
EXPIRED = "device_expired"
MOST_CERTIFICATES = 8
"""Of one device at a time; one that renews when it is due has two."""

_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # Files from before versions have this table already.
        "CREATE TABLE IF NOT EXISTS devices (device_id BLOB PRIMARY KEY, handle TEXT"
        " NOT NULL UNIQUE, public_key BLOB NOT NULL, revoked INTEGER NOT NULL)",
        "ALTER TABLE devices ADD COLUMN enrolled_s INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE devices ADD COLUMN expires_s INTEGER",
        "CREATE TABLE certificates (serial TEXT PRIMARY KEY, device_id BLOB NOT NULL,"
        " expires_s INTEGER NOT NULL, request_digest BLOB NOT NULL, pem BLOB NOT NULL)",
        "CREATE INDEX certificates_of ON certificates (device_id, request_digest)",
        "CREATE TABLE tokens (token_id BLOB PRIMARY KEY, secret_digest BLOB NOT NULL,"
        " private_key BLOB NOT NULL, expires_s INTEGER NOT NULL, failures INTEGER NOT NULL,"
        " used_by BLOB, answer BLOB)",
    ),
    (
        "ALTER TABLE devices ADD COLUMN next_key BLOB",
        "ALTER TABLE devices ADD COLUMN history BLOB NOT NULL DEFAULT x''",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRecord:
    """One registered device; times are Unix seconds."""

    device_id: DeviceId
    handle: str
    public_key: bytes
    revoked: bool
    enrolled_s: int = 0
    expires_s: int | None = None
    """When its certificate ends; None for a device that never had one."""
    next_key: bytes | None = None
    """The key that the device is changing to: good beside `public_key` until it confirms it."""
    history: bytes = field(default=b"", repr=False)
    """How it came to its newest key, for other gateways: see `device_keys`."""

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The keys that it may sign with."""
        if self.next_key is None:
            return (self.public_key,)
        return self.public_key, self.next_key

    def refusal(self, now_s: float) -> str | None:
        """Why nothing from this device is taken, as a code; None when it is."""
        if self.revoked:
            return REVOKED
        if self.expires_s is not None and now_s >= self.expires_s + CLOCK_SKEW_S:
            return EXPIRED
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class IssuedCertificate:
    """A device's certificate and the digest of the request that it answers."""

    serial: int
    expires_s: int
    request_digest: bytes = field(repr=False)
    pem: bytes = field(repr=False)


class DeviceRegistry:
    """See the module. Used by one thread at a time, and by several processes.

    Raises:
        IdentityError: the file is no registry, or from a newer version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._db = open_file(path)
        except (OSError, sqlite3.Error) as error:
            raise self._no_registry(error) from error
        try:
            _migrate(self._db, path)
        except BaseException as error:
            self._db.close()
            if isinstance(error, sqlite3.Error):
                raise self._no_registry(error) from error
            raise

    def _no_registry(self, error: Exception) -> IdentityError:
        return IdentityError(f"{self._path}: cannot be used as a registry ({error})")

    def add(self, record: DeviceRecord) -> None:
        """Register a device, or replace what is known of it; one that is revoked stays so.

        Raises:
            IdentityError: another device has this handle.
            CapacityError: the file cannot be written.
        """
        with self.transaction() as db:
            insert_device(db, record)

    def revoke(self, device_id: DeviceId) -> None:
        """Refuse everything from this device from now on.

        Raises:
            IdentityError: no such device.
            CapacityError: the file cannot be written.
        """
        with self.transaction() as db:
            row = db.execute("UPDATE devices SET revoked = 1 WHERE device_id = ?", (device_id,))
            if row.rowcount != 1:
                raise IdentityError(f"device {device_id.hex()}: not registered here")

    def change_key(
        self, device_id: DeviceId, change: Callable[[DeviceRecord], DeviceRecord]
    ) -> DeviceRecord:
        """Replace a record's keys by what `change` makes of it, while nobody else writes.

        Raises:
            IdentityError: no such device, or what `change` raises; nothing is written then.
            CapacityError: the file cannot be written.
        """
        with self.transaction() as db:
            record = self.find(device_id)
            if record is None:
                raise IdentityError(f"device {device_id.hex()}: not registered here")
            changed = change(record)
            db.execute(
                "UPDATE devices SET public_key = ?, next_key = ?, history = ? WHERE device_id = ?",
                (changed.public_key, changed.next_key, changed.history, device_id),
            )
        return changed

    def find(self, device_id: DeviceId) -> DeviceRecord | None:
        """The record of `device_id`, revoked or not.

        Raises:
            CapacityError: the file cannot be read.
        """
        return next(iter(self._records("WHERE device_id = ?", device_id)), None)

    def find_handle(self, handle: str) -> DeviceRecord | None:
        """The device that has `handle`, revoked or not.

        Raises:
            CapacityError: the file cannot be read.
        """
        return next(iter(self._records("WHERE handle = ?", handle)), None)

    def devices(self) -> list[DeviceRecord]:
        """Every device, the first enrolled first.

        Raises:
            CapacityError: the file cannot be read.
        """
        return self._records("ORDER BY enrolled_s, handle")

    def _records(self, where: str, *values: object) -> list[DeviceRecord]:
        columns = "device_id, handle, public_key, revoked, enrolled_s, expires_s, next_key, history"
        return [
            DeviceRecord(
                device_id=DeviceId(row[0]),
                handle=row[1],
                public_key=row[2],
                revoked=bool(row[3]),
                enrolled_s=row[4],
                expires_s=row[5],
                next_key=row[6],
                history=row[7],
            )
            for row in self.read(f"SELECT {columns} FROM devices {where}", *values)
        ]

    def renewed(self, device_id: DeviceId, issued: IssuedCertificate, *, now_s: float) -> None:
        """Keep a certificate of a device, which lives as long as its youngest one.

        Raises:
            IdentityError: the device has too many that have not ended; nothing is kept.
            CapacityError: the file cannot be written.
        """
        with self.transaction() as db:
            ended_s = int(now_s) - CLOCK_SKEW_S
            db.execute(
                "DELETE FROM certificates WHERE device_id = ? AND expires_s <= ?",
                (device_id, ended_s),
            )
            insert_certificate(db, device_id, issued)
            query = "SELECT count(*) FROM certificates WHERE device_id = ?"
            (count,) = db.execute(query, (device_id,)).fetchone()
            if count > MOST_CERTIFICATES:
                raise IdentityError(
                    f"renewal: this device has {MOST_CERTIFICATES} certificates that have not ended"
                )
            db.execute(
                "UPDATE devices SET expires_s = max(coalesce(expires_s, 0), ?) WHERE device_id = ?",
                (issued.expires_s, device_id),
            )

    def certificate_for(self, device_id: DeviceId, request_digest: bytes) -> bytes | None:
        """The certificate that a request of this device was answered with before, PEM.

        Raises:
            CapacityError: the file cannot be read.
        """
        query = "SELECT pem FROM certificates WHERE device_id = ? AND request_digest = ?"
        rows = self.read(query, device_id, request_digest)
        return bytes(rows[0][0]) if rows else None

    def revoked_serials(self, now_s: float) -> list[int]:
        """Serial numbers of revoked devices' certificates that have not ended.

        Raises:
            CapacityError: the file cannot be read.
        """
        query = (
            "SELECT serial FROM certificates JOIN devices USING (device_id)"
            " WHERE revoked = 1 AND certificates.expires_s > ?"
        )
        return [int(row[0], 16) for row in self.read(query, int(now_s) - CLOCK_SKEW_S)]

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One write: all of it or, after an error or a crash, none of it; others wait.

        Raises:
            CapacityError: the file cannot be written.
        """
        with transaction(self._db, self._unusable) as db:
            yield db

    def read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """The rows of `query`.

        Raises:
            CapacityError: the file cannot be read.
        """
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: sqlite3.Error) -> CapacityError:
        return CapacityError(f"{self._path}: the registry cannot be used ({error})")

    def close(self) -> None:
        self._db.close()


def insert_device(db: sqlite3.Connection, record: DeviceRecord) -> None:
    """Write `record` in a transaction of the registry's.

    Raises:
        IdentityError: another device has this handle.
    """
    try:
        db.execute(
            "INSERT INTO devices (device_id, handle, public_key, revoked, enrolled_s, expires_s,"
            " next_key, history) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (device_id) DO UPDATE SET"
            " handle = excluded.handle, public_key = excluded.public_key,"
            " revoked = max(revoked, excluded.revoked), enrolled_s = excluded.enrolled_s,"
            " expires_s = excluded.expires_s, next_key = excluded.next_key,"
            " history = excluded.history",
            (
                record.device_id,
                record.handle,
                record.public_key,
                record.revoked,
                record.enrolled_s,
                record.expires_s,
                record.next_key,
                record.history,
            ),
        )
    except sqlite3.IntegrityError:
        raise IdentityError(f"handle {record.handle}: is another device's") from None


def insert_certificate(
    db: sqlite3.Connection, device_id: DeviceId, issued: IssuedCertificate
) -> None:
    """Write a certificate in a transaction of the registry's."""
    db.execute(
        "INSERT INTO certificates VALUES (?, ?, ?, ?, ?)",
        (f"{issued.serial:x}", device_id, issued.expires_s, issued.request_digest, issued.pem),
    )


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring the file to this version in one transaction, whatever process comes first."""
    db.execute("BEGIN IMMEDIATE")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(_MIGRATIONS):
        raise IdentityError(
            f"{path}: registry version {version}: this program knows {len(_MIGRATIONS)}"
        )
    for steps in _MIGRATIONS[version:]:
        for step in steps:
            db.execute(step)
    db.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
    db.execute("COMMIT")
