"""The device's durable memory: requests not yet answered, and the answers as they arrive.

A request is here before it is sent and leaves when its answer has been read, when it was
cancelled, or a day after its deadline. Writing an attempt number down before it is used is what
keeps numbers from repeating after a crash.

Everything counts against one cap: prompts, and answers while they grow. An answer that is whole
and that nobody reads makes room for one that is growing, the oldest first; its row stays and says
so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from tidegate.errors import CapacityError, RequestError
from tidegate.link.at_rest import Database
from tidegate.link.envelope import RequestId

KEEP_RESULT_MS = 24 * 3600 * 1000
NORMAL_PRIORITY = 1
"""Lower goes first, as in `tidegate.engine.request.Priority`."""
ANSWER_DROPPED = "answer_dropped"
"""Error code: it was whole, nobody read it, and its room was needed."""
IDEMPOTENCY_KEY = "Idempotency-Key"
"""What errors call a request's name: the header that it comes from."""
OUTBOX_FULL = "outbox_full"
"""Error code: the answer is larger than the room that is left."""
SCHEMA = (
    (
        """CREATE TABLE IF NOT EXISTS requests (
            request_id BLOB PRIMARY KEY, deadline_ms INTEGER NOT NULL, attempt INTEGER NOT NULL,
            outcome INTEGER NOT NULL, code TEXT NOT NULL, sealed_model BLOB NOT NULL,
            sealed_body BLOB NOT NULL)""",
        """CREATE TABLE IF NOT EXISTS chunks (
            request_id BLOB NOT NULL, number INTEGER NOT NULL, sealed BLOB NOT NULL,
            PRIMARY KEY (request_id, number))""",
    ),
    (
        f"ALTER TABLE requests ADD COLUMN priority INTEGER NOT NULL DEFAULT {NORMAL_PRIORITY}",
        "ALTER TABLE requests ADD COLUMN name BLOB",
        "ALTER TABLE requests ADD COLUMN sealed_digest BLOB",
        "CREATE UNIQUE INDEX requests_by_name ON requests (name)",
    ),
)
_ROWS_AT_ONCE = 128
"""Payloads that one statement stores: SQLite gives the interpreter away at each."""
_COLUMNS = (
    "request_id, deadline_ms, attempt, outcome, code, sealed_model, sealed_body, priority,"
    " sealed_digest"
)


class Outcome(IntEnum):
    """How a request stands."""

    OPEN = 0
    DONE = 1
    FAILED = 2


class OutboxFullError(CapacityError):
    """The answer that is being received has no room left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutboxRow:
    """One request. `deadline_ms` is Unix time; `attempt` is the next one to use.

    `body` is gone once the request is over. `digest` is what its caller named it with.
    """

    request_id: RequestId
    deadline_ms: int
    attempt: int
    outcome: Outcome
    code: str
    model: str | None
    body: bytes = field(repr=False)
    priority: int
    digest: bytes | None = field(repr=False)


class Name(NamedTuple):
    """What a caller calls a request, to find it again after a crash of either.

    `key` is its own word for it, `digest` stands for what was asked under that word.
    """

    key: str
    digest: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A request in the outbox, without its content; `held_bytes` are prompt and answer."""

    request_id: RequestId
    outcome: Outcome
    code: str
    deadline_ms: int
    priority: int
    held_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """Payloads `first`, ... of one request, and how it stands with them."""

    request_id: RequestId
    first: int
    payloads: Sequence[bytes] = field(repr=False)
    outcome: Outcome
    code: str


class Outbox:
    """The device's store.

    `add` refuses what would exceed `max_rows` or `max_bytes`, `save` what would exceed
    `max_bytes`. `dropped` counts the unread answers that had to make room.
    """

    def __init__(
        self, database: Database, *, max_rows: int = 1000, max_bytes: int = 64 * 1024 * 1024
    ) -> None:
        self.dropped = 0
        self._db = database
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._bytes = self._count_bytes()

    @classmethod
    def open(cls, path: Path) -> Outbox:
        """Open or make the outbox at `path`; its key lies beside it.

        Raises:
            LinkError, IdentityError: see `at_rest.Database`.
        """
        return cls(Database(path, SCHEMA))

    def add(
        self,
        request_id: RequestId,
        body: bytes,
        *,
        deadline_ms: int,
        model: str | None,
        priority: int = NORMAL_PRIORITY,
        name: Name | None = None,
    ) -> None:
        """Store a new request.

        Raises:
            RequestError: another request has this name.
            CapacityError: the outbox is full.
        """
        if name is not None and self.find_named(name.key) is not None:
            raise RequestError(IDEMPOTENCY_KEY, "is another request's, too", status=409)
        ((rows,),) = self._db.read("SELECT COUNT(*) FROM requests")
        if rows >= self._max_rows:
            raise CapacityError(f"outbox: {rows} requests: at most {self._max_rows} may wait")
        seal = self._db.cipher.seal
        sealed_body = seal(request_id, "body", body)
        if not self.make_room(len(sealed_body)):
            raise CapacityError(f"outbox: full, at most {self._max_bytes} bytes may wait")
        values = (
            request_id,
            deadline_ms,
            seal(request_id, "model", (model or "").encode()),
            sealed_body,
            priority,
            None if name is None else self._hidden(name.key),
            None if name is None else seal(request_id, "digest", name.digest),
        )
        with self._db.write() as db:
            db.execute(
                "INSERT INTO requests (request_id, deadline_ms, attempt, outcome, code,"
                " sealed_model, sealed_body, priority, name, sealed_digest)"
                " VALUES (?, ?, 0, 0, '', ?, ?, ?, ?, ?)",
                values,
            )
        self._bytes += len(sealed_body)

    def make_room(self, new_bytes: int) -> bool:
        """Drop unread answers, the oldest first, until `new_bytes` fit; False when they do not.

        Raises:
            CapacityError: the disk refuses.
        """
        if self._bytes + new_bytes <= self._max_bytes:
            return True
        for request_id, outcome in self.ids():
            if outcome is not Outcome.OPEN and self._held_bytes(request_id):
                self._drop_answer(request_id)
            if self._bytes + new_bytes <= self._max_bytes:
                return True
        return False

    def use_attempt(self, request_id: RequestId, attempt: int) -> None:
        """Write down that `attempt` is about to be used."""
        with self._db.write() as db:
            db.execute(
                "UPDATE requests SET attempt = ? WHERE request_id = ?", (attempt + 1, request_id)
            )

    def save(
        self,
        request_id: RequestId,
        first: int,
        payloads: Sequence[bytes],
        *,
        outcome: Outcome = Outcome.OPEN,
        code: str = "",
    ) -> None:
        """Store payloads `first`, ... and how the request stands, all at once.

        Raises:
            OutboxFullError: there is no room, even without the answers that nobody reads.
            CapacityError: the disk refuses.
        """
        growth = Growth(
            request_id=request_id, first=first, payloads=payloads, outcome=outcome, code=code
        )
        self.save_all([growth])

    def save_all(self, growths: Sequence[Growth]) -> None:
        """Store what several requests have got since, all at once.

        Raises:
            OutboxFullError: there is no room, even without the answers that nobody reads.
            CapacityError: the disk refuses.
        """
        numbered = [
            (one.request_id, number, payload)
            for one in growths
            for number, payload in enumerate(one.payloads, one.first)
        ]
        sealed = self._db.cipher.seal_all(
            [(request_id, f"chunk {number}", payload) for request_id, number, payload in numbered]
        )
        rows = [(*place[:2], value) for place, value in zip(numbered, sealed, strict=True)]
        new_bytes = sum(map(len, sealed))
        if rows and not self.make_room(new_bytes):
            raise OutboxFullError(f"outbox: full, at most {self._max_bytes} bytes may wait")
        ended = [one for one in growths if one.outcome is not Outcome.OPEN]
        freed_bytes = sum(self._body_bytes(one.request_id) for one in ended)
        stored = 0
        with self._db.write() as db:
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                some = rows[start : start + _ROWS_AT_ONCE]
                places = ", ".join(["(?, ?, ?)"] * len(some))
                stored += db.execute(
                    f"INSERT OR IGNORE INTO chunks VALUES {places}",
                    [value for row in some for value in row],
                ).rowcount
            db.executemany(
                "UPDATE requests SET outcome = ?, code = ?, sealed_body = x'' WHERE request_id = ?",
                [(one.outcome, one.code, one.request_id) for one in ended],
            )
        self._bytes += new_bytes - freed_bytes
        if stored != len(rows):
            self._bytes = self._count_bytes()

    def remove(self, request_id: RequestId) -> None:
        """Forget a request and its answer."""
        freed_bytes = self._held_bytes(request_id)
        with self._db.write() as db:
            db.execute("DELETE FROM chunks WHERE request_id = ?", (request_id,))
            db.execute("DELETE FROM requests WHERE request_id = ?", (request_id,))
        self._bytes -= freed_bytes
        self._db.cipher.forget(request_id)

    def expire(self, now_ms: int) -> None:
        """Forget what nobody fetched within a day after its deadline, and empty the log.

        An open request stays, whatever the wall clock says now: its session ends it first.
        """
        for (request_id,) in self._db.read(
            "SELECT request_id FROM requests WHERE deadline_ms < ? AND outcome != ?",
            now_ms - KEEP_RESULT_MS,
            Outcome.OPEN,
        ):
            self.remove(request_id)
        self._db.sweep()

    def find(self, request_id: RequestId) -> OutboxRow | None:
        """The row of `request_id`.

        Raises:
            LinkError: its content is damaged.
        """
        rows = self._db.read(f"SELECT {_COLUMNS} FROM requests WHERE request_id = ?", request_id)
        return self._row(rows[0]) if rows else None

    def find_named(self, key: str) -> OutboxRow | None:
        """The row that was added under `key`.

        Raises:
            LinkError: its content is damaged.
        """
        rows = self._db.read(f"SELECT {_COLUMNS} FROM requests WHERE name = ?", self._hidden(key))
        return self._row(rows[0]) if rows else None

    def ids(self) -> list[tuple[RequestId, Outcome]]:
        """All requests, oldest first."""
        rows = self._db.read("SELECT request_id, outcome FROM requests ORDER BY request_id")
        return [(RequestId(request_id), Outcome(outcome)) for request_id, outcome in rows]

    def held(self) -> list[Held]:
        """All requests, oldest first, with what they hold."""
        rows = self._db.read(
            "SELECT request_id, outcome, code, deadline_ms, priority, LENGTH(sealed_body) +"
            " (SELECT COALESCE(SUM(LENGTH(sealed)), 0) FROM chunks"
            "  WHERE chunks.request_id = requests.request_id)"
            " FROM requests ORDER BY request_id"
        )
        return [
            Held(
                request_id=RequestId(request_id),
                outcome=Outcome(outcome),
                code=code,
                deadline_ms=deadline_ms,
                priority=priority,
                held_bytes=held_bytes,
            )
            for request_id, outcome, code, deadline_ms, priority, held_bytes in rows
        ]

    def payloads(self, request_id: RequestId) -> list[bytes]:
        """The answer so far, in order.

        Raises:
            LinkError: its content is damaged.
        """
        rows = self._db.read(
            "SELECT number, sealed FROM chunks WHERE request_id = ? ORDER BY number", request_id
        )
        return [
            self._db.cipher.open(request_id, f"chunk {number}", sealed) for number, sealed in rows
        ]

    def close(self) -> None:
        self._db.close()

    def _drop_answer(self, request_id: RequestId) -> None:
        freed_bytes = self._held_bytes(request_id)
        with self._db.write() as db:
            db.execute("DELETE FROM chunks WHERE request_id = ?", (request_id,))
            db.execute(
                "UPDATE requests SET outcome = ?, code = ? WHERE request_id = ? AND outcome = ?",
                (Outcome.FAILED, ANSWER_DROPPED, request_id, Outcome.DONE),
            )
        self._bytes -= freed_bytes
        self.dropped += 1

    def _count_bytes(self) -> int:
        return sum(held.held_bytes for held in self.held())

    def _held_bytes(self, request_id: RequestId) -> int:
        ((chunk_bytes,),) = self._db.read(
            "SELECT COALESCE(SUM(LENGTH(sealed)), 0) FROM chunks WHERE request_id = ?", request_id
        )
        return self._body_bytes(request_id) + int(chunk_bytes)

    def _body_bytes(self, request_id: RequestId) -> int:
        rows = self._db.read(
            "SELECT LENGTH(sealed_body) FROM requests WHERE request_id = ?", request_id
        )
        return int(rows[0][0]) if rows else 0

    def _hidden(self, key: str) -> bytes:
        """A name as it lies on the disk: the same for the same key, and telling nobody else."""
        return self._db.cipher.fingerprint("name", key.encode())

    def _row(self, row: tuple[Any, ...]) -> OutboxRow:
        request_id, deadline_ms, attempt, outcome, code, model, body, priority, digest = row
        unseal = self._db.cipher.open
        return OutboxRow(
            request_id=RequestId(request_id),
            deadline_ms=deadline_ms,
            attempt=attempt,
            outcome=Outcome(outcome),
            code=code,
            model=unseal(request_id, "model", model).decode() or None,
            body=unseal(request_id, "body", body) if body else b"",
            priority=priority,
            digest=None if digest is None else unseal(request_id, "digest", digest),
        )
