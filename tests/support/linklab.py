"""Small real parts for the link's tests: a pair of peers and a database that crashes."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tidegate.errors import CapacityError
from tidegate.link.at_rest import Database, Schema
from tidegate.link.envelope import (
    DeviceAttempt,
    DeviceId,
    GatewayAttempt,
    RequestId,
    new_request_id,
    seal_request,
)
from tidegate.link.opening import PartialRequest, open_first
from tidegate.link.suites import X25519, PrivatePrekey
from tidegate.link.timing import Timing

HANDLE = "0123456789abcdef0123456789abcdef"
PREKEY_ID = b"prekey-0"
DEVICE_ID = DeviceId(b"device-id-16byte")
FAST = Timing(
    pacing="off",
    tick_s=0.0,
    heartbeat_s=0.2,
    silence_s=0.6,
    resend_min_s=0.1,
    resend_max_s=1.0,
    ack_delay_s=0.03,
    lease_s=5.0,
    connect_timeout_s=1.0,
    advert_every_s=0.5,
    advert_valid_s=30.0,
)
"""Waits for tests in real time."""


@dataclass(frozen=True, kw_only=True)
class Peers:
    """The keys of one device and one gateway."""

    prekey: PrivatePrekey
    device_key: Ed25519PrivateKey
    gateway_key: Ed25519PrivateKey
    device_id: DeviceId = DEVICE_ID
    handle: str = HANDLE

    def seal(
        self, body: bytes, *, request_id: RequestId | None = None, attempt: int = 0
    ) -> tuple[bytes, DeviceAttempt]:
        """A request that fits into one message."""
        (message,), keys = self.seal_all(body, request_id=request_id, attempt=attempt)
        return message, keys

    def seal_all(
        self, body: bytes, *, request_id: RequestId | None = None, attempt: int = 0
    ) -> tuple[list[bytes], DeviceAttempt]:
        return seal_request(
            body,
            request_id=request_id or new_request_id(1_800_000_000_000),
            attempt=attempt,
            prekey_id=PREKEY_ID,
            prekey=self.prekey.public,
            gateway_key=self.gateway_key.public_key(),
            device_id=self.device_id,
            device_key=self.device_key,
            handle=self.handle,
        )

    def open_first(self, message: bytes, *, handle: str | None = None) -> PartialRequest:
        def find_prekey(suite: int, prekey_id: bytes) -> PrivatePrekey | None:
            known = (suite, prekey_id) == (self.prekey.public.suite, PREKEY_ID)
            return self.prekey if known else None

        def find_device(device_id: DeviceId) -> list[Ed25519PublicKey]:
            return [self.device_key.public_key()] if device_id == self.device_id else []

        return open_first(
            message,
            handle=handle or self.handle,
            find_prekey=find_prekey,
            find_device=find_device,
        )

    def open(
        self,
        *messages: bytes,
        handle: str | None = None,
        new_key: Callable[[], X25519PrivateKey] = X25519PrivateKey.generate,
    ) -> GatewayAttempt:
        partial = self.open_first(messages[0], handle=handle)
        for message in messages[1:]:
            partial.take(message)
        return partial.finish(self.gateway_key, new_key)


def new_peers(suite: int = X25519) -> Peers:
    return Peers(
        prekey=PrivatePrekey.generate(suite),
        device_key=Ed25519PrivateKey.generate(),
        gateway_key=Ed25519PrivateKey.generate(),
    )


class Crash(BaseException):
    """The process dies here. A BaseException: nothing may tidy up after it."""


class CrashingDatabase(Database):
    """Dies before or after a chosen write. It outlives the crash as the disk does.

    `fuse` is the number of writes that still succeed. With `power_cut` the machine dies and not
    the process alone: every write since the last synced one is lost. It does not fsync itself,
    since simulations write a lot.
    """

    def __init__(
        self,
        path: Path,
        schema: Schema,
        *,
        fuse: int | None = None,
        after_commit: bool = False,
        statements: int | None = None,
    ) -> None:
        self.fuse = fuse
        self.writes = 0
        self.after_commit = after_commit
        self.power_cut = False
        self.lost_writes = 0
        """To power cuts."""
        self._unsynced = 0
        self._at_sync: dict[str, list[tuple[Any, ...]]] = {}
        """The rows of every table as the disk has them for sure, while some are not."""
        self.statements = statements
        """Of a schema that are still run."""
        self.refuse = False
        """As a full disk does, also for what takes no room."""
        super().__init__(path, schema)
        self._db.execute("PRAGMA synchronous = OFF")

    def light(self, rng: random.Random, longest: int) -> None:
        self.fuse = rng.randrange(longest)
        self.after_commit = rng.random() < 0.5
        self.power_cut = rng.random() < 0.5

    def _set_synced(self, synced: bool) -> None:
        """Nothing is synced here; `write` keeps account of what would have been."""

    def _die(self) -> NoReturn:
        if self.power_cut and self._unsynced:
            with super().write() as db:
                for table, rows in self._at_sync.items():
                    db.execute(f"DELETE FROM {table}")
                    for row in rows:
                        places = ", ".join("?" * len(row))
                        db.execute(f"INSERT INTO {table} VALUES ({places})", row)
            self.lost_writes += self._unsynced
        self._unsynced = 0
        raise Crash

    def _rows(self) -> dict[str, list[tuple[Any, ...]]]:
        tables = self.read("SELECT name FROM sqlite_master WHERE type = 'table'")
        return {table: self.read(f"SELECT * FROM {table}") for (table,) in tables}

    def _run(self, db: sqlite3.Connection, statement: str) -> None:
        if self.statements == 0:
            raise Crash
        self.statements = None if self.statements is None else self.statements - 1
        super()._run(db, statement)

    @contextmanager
    def write(self, *, synced: bool = True) -> Iterator[sqlite3.Connection]:
        if self.refuse:
            raise CapacityError("the disk is full")
        dying = self.fuse == 0
        if self.fuse is not None:
            self.fuse = None if dying else self.fuse - 1
        if dying and not self.after_commit:
            self._die()
        if not synced and not self._unsynced:
            self._at_sync = self._rows()
        with super().write(synced=synced) as db:
            yield db
        self._unsynced = 0 if synced else self._unsynced + 1
        self.writes += 1
        if dying:
            self._die()
