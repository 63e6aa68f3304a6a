"""The gateway's durable memory: which requests exist, and the answers until they are fetched.

The row of (device, request) is written before work starts and outlives the answer, because it is
what makes a replayed or repeated request harmless: an attempt number that is not higher than the
row's is never served. Rows are dropped once their request id is older than the gateway accepts.

Rows, attempts and endings are on the disk before anything is said that depends on them. Payloads
outlive the process; a power cut takes the newest of them, and they are produced again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tidegate.errors import CapacityError
from tidegate.link.at_rest import Database
from tidegate.link.envelope import DeviceId, RequestId
from tidegate.link.messages import Status

SCHEMA = (
    (
        """CREATE TABLE IF NOT EXISTS requests (
            device_id BLOB NOT NULL, request_id BLOB NOT NULL, attempt INTEGER NOT NULL,
            status INTEGER NOT NULL, code TEXT NOT NULL, closed INTEGER NOT NULL,
            PRIMARY KEY (device_id, request_id)) WITHOUT ROWID""",
        "CREATE INDEX IF NOT EXISTS requests_by_age ON requests (request_id)",
        """CREATE TABLE IF NOT EXISTS chunks (
            device_id BLOB NOT NULL, request_id BLOB NOT NULL, number INTEGER NOT NULL,
            sealed BLOB NOT NULL, PRIMARY KEY (device_id, request_id, number))""",
        "CREATE TABLE IF NOT EXISTS adverts (version INTEGER NOT NULL)",
    ),
    (
        # When its device stops waiting. What an older release began is kept as long as its id.
        f"ALTER TABLE requests ADD COLUMN expires_ms INTEGER NOT NULL DEFAULT {2**62}",
        "CREATE INDEX requests_by_expiry ON requests (closed, expires_ms)",
    ),
)
"""Unix times in ms."""
_KEEP_EXPIRED_MS = 3600 * 1000
"""An answer outlives its device's patience by this much, for clocks that jump."""
_FULL_SHARE = 0.75
"""Of `max_bytes` that begun answers may fill before no new one is begun."""
_ROWS_AT_ONCE = 128
"""Chunks that one statement stores: SQLite gives the interpreter away at each."""
_WHERE = "WHERE device_id = ? AND request_id = ?"


class RequestKey(NamedTuple):
    """What identifies a request for good."""

    device_id: DeviceId
    request_id: RequestId


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayRow:
    """One request. `closed`: the device has its answer or cancelled; nothing is left to send."""

    attempt: int
    status: Status
    code: str
    closed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """New payloads of one answer, and how it ended if it did."""

    key: RequestKey
    first: int
    payloads: Sequence[bytes] = field(repr=False)
    status: Status = Status.MORE
    code: str = ""


class GatewayStore:
    """The gateway's store.

    `begin` refuses to exceed `max_rows`, which is 72 h of 19 requests a second, and what would
    fill more than three quarters of `max_bytes`; `room_bytes` is what the answers that were begun
    may still grow by.
    """

    def __init__(
        self,
        database: Database,
        *,
        max_rows: int = 5_000_000,
        max_bytes: int = 4 * 1024 * 1024 * 1024,
    ) -> None:
        self._db = database
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._rows = self._count()
        self._bytes = self._chunk_bytes()

    @classmethod
    def open(cls, path: Path) -> GatewayStore:
        """Open or make the store at `path`; its key lies beside it.

        Raises:
            LinkError, IdentityError: see `at_rest.Database`.
        """
        return cls(Database(path, SCHEMA))

    @property
    def room_bytes(self) -> int:
        """What may still be stored of answers."""
        return max(0, self._max_bytes - self._bytes)

    def find(self, key: RequestKey) -> GatewayRow | None:
        rows = self._db.read(f"SELECT attempt, status, code, closed FROM requests {_WHERE}", *key)
        if not rows:
            return None
        attempt, status, code, closed = rows[0]
        return GatewayRow(attempt=attempt, status=Status(status), code=code, closed=bool(closed))

    def begin(self, key: RequestKey, attempt: int, *, expires_ms: int) -> None:
        """Write the row that must exist before any work on the request.

        Its answer is of no use to anyone after `expires_ms`.

        Raises:
            CapacityError: too many rows, or bytes of answers that nobody fetched.
        """
        if self._rows >= self._max_rows:
            raise CapacityError(f"gateway store: {self._rows} rows: at most {self._max_rows}")
        if self._bytes >= self._max_bytes * _FULL_SHARE:
            raise CapacityError(f"gateway store: at most {self._max_bytes} bytes of answers")
        with self._db.write() as db:
            db.execute(
                "INSERT INTO requests (device_id, request_id, attempt, status, code, closed,"
                " expires_ms) VALUES (?, ?, ?, ?, '', 0, ?)",
                (*key, attempt, Status.MORE, expires_ms),
            )
        self._rows += 1

    def use_attempt(self, key: RequestKey, attempt: int) -> None:
        """Serve `attempt` and none before it from now on."""
        with self._db.write() as db:
            db.execute(f"UPDATE requests SET attempt = ? {_WHERE}", (attempt, *key))

    def append(self, batch: Sequence[Progress]) -> None:
        """Store new payloads and endings of many requests in one transaction.

        Payloads alone are not synced: when the machine loses power they are produced again, and
        compared with what the device has (docs/link-sessions.md). An ending is: it says that
        nothing has to run again.
        """
        numbered = [
            (item.key, number, payload)
            for item in batch
            for number, payload in enumerate(item.payloads, item.first)
        ]
        sealed = self._db.cipher.seal_all(
            [(b"".join(key), f"chunk {number}", payload) for key, number, payload in numbered]
        )
        rows = [
            (*key, number, value) for (key, number, _), value in zip(numbered, sealed, strict=True)
        ]
        ends = [
            (item.status, item.code, *item.key) for item in batch if item.status is not Status.MORE
        ]
        stored = 0
        with self._db.write(synced=bool(ends)) as db:
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                some = rows[start : start + _ROWS_AT_ONCE]
                places = ", ".join(["(?, ?, ?, ?)"] * len(some))
                stored += db.execute(
                    f"INSERT OR IGNORE INTO chunks VALUES {places}",
                    [value for row in some for value in row],
                ).rowcount
            db.executemany(f"UPDATE requests SET status = ?, code = ? {_WHERE}", ends)
        # Payloads that were there already take no more room; how much they are, only a count tells.
        again = stored < len(rows)
        self._bytes = self._chunk_bytes() if again else self._bytes + sum(map(len, sealed))

    def close_request(self, key: RequestKey, code: str = "already_answered") -> None:
        """Drop the answer and keep the row; `code` is what a later attempt is told."""
        self._close([key], code)

    def _close(self, keys: Sequence[RequestKey], code: str) -> None:
        freed_bytes = sum(self._chunk_bytes(_WHERE, *key) for key in keys)
        with self._db.write() as db:
            db.executemany(f"DELETE FROM chunks {_WHERE}", keys)
            db.executemany(
                f"UPDATE requests SET closed = 1, code = ? {_WHERE}", [(code, *key) for key in keys]
            )
        self._bytes -= freed_bytes
        for key in keys:
            self._db.cipher.forget(b"".join(key))

    def payloads(self, key: RequestKey) -> list[bytes]:
        """The stored part of an answer, in order.

        Raises:
            LinkError: it is damaged.
        """
        rows = self._db.read(f"SELECT number, sealed FROM chunks {_WHERE} ORDER BY number", *key)
        row_key = b"".join(key)
        return [self._db.cipher.open(row_key, f"chunk {number}", data) for number, data in rows]

    def expire(self, oldest_ms: int, *, now_ms: int) -> None:
        """Drop requests made before `oldest_ms`, and answers nobody waits for at `now_ms`.

        The row of such an answer stays, closed, until its id is too old to be accepted.
        """
        self._drop_old(oldest_ms)
        self._drop_late(now_ms - _KEEP_EXPIRED_MS)
        self._db.sweep()

    def _drop_late(self, before_ms: int) -> None:
        late = [
            RequestKey(device_id, request_id)
            for device_id, request_id in self._db.read(
                "SELECT device_id, request_id FROM requests WHERE closed = 0 AND expires_ms < ?",
                before_ms,
            )
        ]
        if late:
            self._close(late, "deadline_exceeded")

    def _drop_old(self, oldest_ms: int) -> None:
        oldest = max(0, oldest_ms).to_bytes(6, "big")
        old_chunks = (
            "WHERE (device_id, request_id) IN"
            " (SELECT device_id, request_id FROM requests WHERE request_id < ?)"
        )
        freed_bytes = self._chunk_bytes(old_chunks, oldest)
        with self._db.write() as db:
            db.execute(f"DELETE FROM chunks {old_chunks}", (oldest,))
            db.execute("DELETE FROM requests WHERE request_id < ?", (oldest,))
        self._bytes -= freed_bytes
        self._rows = self._count()

    def _chunk_bytes(self, where: str = "", *values: object) -> int:
        ((held_bytes,),) = self._db.read(
            f"SELECT COALESCE(SUM(LENGTH(sealed)), 0) FROM chunks {where}", *values
        )
        return int(held_bytes)

    def _count(self) -> int:
        ((rows,),) = self._db.read("SELECT COUNT(*) FROM requests")
        return int(rows)

    def next_advert_version(self, now_ms: int) -> int:
        """A version above every earlier one, also when the clock went back."""
        ((last,),) = self._db.read("SELECT COALESCE(MAX(version), 0) FROM adverts")
        version = max(int(last) + 1, now_ms)
        with self._db.write() as db:
            db.execute("DELETE FROM adverts")
            db.execute("INSERT INTO adverts VALUES (?)", (version,))
        return version

    def close(self) -> None:
        self._db.close()
