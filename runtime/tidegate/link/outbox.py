"""The device's durable memory: requests not yet answered, and the answers as they arrive.

A request is here before it is sent and leaves when its answer has been read, when it was
cancelled, or a day after its deadline. Writing an attempt number down before it is used is what
keeps numbers from repeating after a crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from tidegate.errors import CapacityError
from tidegate.link.at_rest import Database
from tidegate.link.envelope import RequestId

KEEP_RESULT_MS = 24 * 3600 * 1000
SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    request_id BLOB PRIMARY KEY, deadline_ms INTEGER NOT NULL, attempt INTEGER NOT NULL,
    outcome INTEGER NOT NULL, code TEXT NOT NULL, sealed_model BLOB NOT NULL,
    sealed_body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS chunks (
    request_id BLOB NOT NULL, number INTEGER NOT NULL, sealed BLOB NOT NULL,
    PRIMARY KEY (request_id, number));
"""


class Outcome(IntEnum):
    """How a request stands."""

    OPEN = 0
    DONE = 1
    FAILED = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class OutboxRow:
    """One request. `deadline_ms` is Unix time; `attempt` is the next one to use."""

    request_id: RequestId
    deadline_ms: int
    attempt: int
    outcome: Outcome
    code: str
    model: str | None
    body: bytes = field(repr=False)


class Outbox:
    """The device's store. Bounded: `add` refuses what would exceed `max_rows` or `max_bytes`."""

    def __init__(
        self, database: Database, *, max_rows: int = 1000, max_bytes: int = 64 * 1024 * 1024
    ) -> None:
        self._db = database
        self._max_rows = max_rows
        self._max_bytes = max_bytes

    @classmethod
    def open(cls, path: Path) -> Outbox:
        """Open or make the outbox at `path`; its key lies beside it.

        Raises:
            LinkError, IdentityError: see `at_rest.Database`.
        """
        return cls(Database(path, SCHEMA))

    def add(
        self, request_id: RequestId, body: bytes, *, deadline_ms: int, model: str | None
    ) -> None:
        """Store a new request.

        Raises:
            CapacityError: the outbox is full.
        """
        rows, held_bytes = self._size()
        if rows >= self._max_rows:
            raise CapacityError(f"outbox: {rows} requests: at most {self._max_rows} may wait")
        if held_bytes + len(body) > self._max_bytes:
            raise CapacityError(f"outbox: full, at most {self._max_bytes} bytes may wait")
        seal = self._db.cipher.seal
        values = (
            request_id,
            deadline_ms,
            seal(request_id, "model", (model or "").encode()),
            seal(request_id, "body", body),
        )
        with self._db.write() as db:
            db.execute("INSERT INTO requests VALUES (?, ?, 0, 0, '', ?, ?)", values)

    def _size(self) -> tuple[int, int]:
        ((rows, body_bytes),) = self._db.read(
            "SELECT COUNT(*), COALESCE(SUM(LENGTH(sealed_body)), 0) FROM requests"
        )
        ((chunk_bytes,),) = self._db.read("SELECT COALESCE(SUM(LENGTH(sealed)), 0) FROM chunks")
        return rows, body_bytes + chunk_bytes

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
        """Store payloads `first`, ... and how the request stands, all at once."""
        rows = [
            (request_id, first + i, self._db.cipher.seal(request_id, f"chunk {first + i}", payload))
            for i, payload in enumerate(payloads)
        ]
        with self._db.write() as db:
            db.executemany("INSERT OR IGNORE INTO chunks VALUES (?, ?, ?)", rows)
            if outcome is not Outcome.OPEN:
                db.execute(
                    "UPDATE requests SET outcome = ?, code = ? WHERE request_id = ?",
                    (outcome, code, request_id),
                )

    def remove(self, request_id: RequestId) -> None:
        """Forget a request and its answer."""
        with self._db.write() as db:
            db.execute("DELETE FROM chunks WHERE request_id = ?", (request_id,))
            db.execute("DELETE FROM requests WHERE request_id = ?", (request_id,))

    def expire(self, now_ms: int) -> None:
        """Forget what nobody fetched within a day after its deadline.

        An open request stays, whatever the wall clock says now: its session ends it first.
        """
        for (request_id,) in self._db.read(
            "SELECT request_id FROM requests WHERE deadline_ms < ? AND outcome != ?",
            now_ms - KEEP_RESULT_MS,
            Outcome.OPEN,
        ):
            self.remove(request_id)

    def find(self, request_id: RequestId) -> OutboxRow | None:
        """The row of `request_id`.

        Raises:
            LinkError: its content is damaged.
        """
        rows = self._db.read("SELECT * FROM requests WHERE request_id = ?", request_id)
        return self._row(rows[0]) if rows else None

    def ids(self) -> list[tuple[RequestId, Outcome]]:
        """All requests, oldest first."""
        rows = self._db.read("SELECT request_id, outcome FROM requests ORDER BY request_id")
        return [(RequestId(request_id), Outcome(outcome)) for request_id, outcome in rows]

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

    def _row(self, row: tuple[Any, ...]) -> OutboxRow:
        request_id, deadline_ms, attempt, outcome, code, sealed_model, sealed_body = row
        model = self._db.cipher.open(request_id, "model", sealed_model).decode()
        return OutboxRow(
            request_id=RequestId(request_id),
            deadline_ms=deadline_ms,
            attempt=attempt,
            outcome=Outcome(outcome),
            code=code,
            model=model or None,
            body=self._db.cipher.open(request_id, "body", sealed_body),
        )

    def close(self) -> None:
        self._db.close()
