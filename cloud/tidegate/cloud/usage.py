"""What every call used and cost: one row for each, in `usage.sqlite` of the service's state folder.

Rows wait in memory and are written together, each second or each 256: a crash loses at most what
ended in the last second before it. A row is written under its call's random id, once however often
it is tried. Counts of quotas begin from these rows when the service starts again, so they are kept
for more than a month. Old ones go by whole days (UTC), so that a day in an export is whole or gone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Final

from tidegate.api.admission import Outcome
from tidegate.link.at_rest import Database

FILE: Final = "usage.sqlite"
FLUSH_S: Final = 1.0
FLUSH_ROWS: Final = 256
MOST_WAITING: Final = 50_000
"""Rows that may wait for a disk that takes none; then no further call is admitted."""
LINK: Final = "link"
"""The endpoint of calls that came over the link."""
NANO: Final = 1_000_000_000
DAY_S: Final = 86_400
LEAST_DAYS: Final = 32
"""Rows are kept for: quotas of a month are counted from them."""
_DELETED_AT_ONCE: Final = 2000
"""In one transaction, so that calls of now need not wait for long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageRow:
    """One call. Times are Unix seconds; a call belongs to the day in which it began."""

    id: str
    key_id: str
    key_name: str
    request_id: str
    endpoint: str
    model: str
    began_s: float
    ended_s: float
    status: int
    outcome: Outcome
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_nano: int
    """Billionths of the currency that the key's prices are in."""


_NAMES: Final = tuple(one.name for one in fields(UsageRow))
_SCHEMA: Final = (
    (
        "CREATE TABLE calls (id TEXT PRIMARY KEY, key_id TEXT NOT NULL, key_name TEXT NOT NULL,"
        " request_id TEXT NOT NULL, endpoint TEXT NOT NULL, model TEXT NOT NULL,"
        " began_s REAL NOT NULL, ended_s REAL NOT NULL, status INTEGER NOT NULL,"
        " outcome TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,"
        " completion_tokens INTEGER NOT NULL, cost_nano INTEGER NOT NULL) WITHOUT ROWID",
        "CREATE INDEX calls_of ON calls (key_id, began_s)",
        "CREATE INDEX calls_at ON calls (began_s)",
    ),
    (
        "CREATE TABLE pruned (one INTEGER PRIMARY KEY CHECK (one = 1), before_s REAL NOT NULL)",
        "INSERT INTO pruned VALUES (1, 0)",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sum:
    """What a key used in a while."""

    requests: int
    tokens: int


class UsageBook:
    """See the module. Every method may be called from any thread.

    Raises:
        LinkError: the file is no usage book, or a newer release wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self._db = Database(folder / FILE, _SCHEMA)
        self._db_turn = threading.Lock()
        self._waiting: list[UsageRow] = []
        self._turn = threading.Lock()

    @property
    def waiting(self) -> int:
        """Rows that are not on the disk yet."""
        return len(self._waiting)

    def add(self, row: UsageRow) -> None:
        """Keep a row for the next `flush`."""
        with self._turn:
            self._waiting.append(row)

    def flush(self) -> None:
        """Write what waits.

        Raises:
            CapacityError: the disk takes nothing; the rows go on waiting.
        """
        with self._db_turn:
            with self._turn:
                rows = self._waiting[:]
            if not rows:
                return
            marks = ", ".join("?" * len(_NAMES))
            with self._db.write() as db:
                db.executemany(
                    f"INSERT OR IGNORE INTO calls VALUES ({marks})", [astuple(row) for row in rows]
                )
            with self._turn:
                del self._waiting[: len(rows)]

    def since(self, key_id: str, since_s: float) -> Sum:
        """What a key's calls that began at `since_s` or later used.

        Raises:
            CapacityError: the file cannot be read.
        """
        self.flush()
        with self._db_turn:
            ((requests, tokens),) = self._db.read(
                "SELECT count(*), coalesce(sum(prompt_tokens + completion_tokens), 0) FROM calls"
                " WHERE key_id = ? AND began_s >= ?",
                key_id,
                since_s,
            )
        return Sum(requests=requests, tokens=tokens)

    def rows(self, from_s: float, to_s: float) -> Iterator[UsageRow]:
        """Calls that began in [from_s, to_s), the oldest first."""
        last: tuple[float, str] = (from_s, "")
        while True:
            with self._db_turn:
                page = self._db.read(
                    f"SELECT {', '.join(_NAMES)} FROM calls WHERE (began_s, id) > (?, ?)"
                    " AND began_s < ? ORDER BY began_s, id LIMIT 1000",
                    *last,
                    to_s,
                )
            for one in page:
                yield UsageRow(**dict(zip(_NAMES, one, strict=True)))
            if len(page) < 1000:
                return
            last = (page[-1][_NAMES.index("began_s")], page[-1][0])

    @property
    def pruned_before_s(self) -> float:
        """Calls that began before this may be gone, by whole days; 0 while none is.

        Raises:
            CapacityError: the file cannot be read.
        """
        with self._db_turn:
            ((before_s,),) = self._db.read("SELECT before_s FROM pruned")
        return float(before_s)

    def prune(self, before_s: float) -> int:
        """Delete calls of the days (UTC) that ended at `before_s` or earlier; how many they were.

        Raises:
            CapacityError: the disk takes nothing; what was deleted until then stays deleted.
        """
        day_s, deleted = before_s // DAY_S * DAY_S, 0
        if day_s <= self.pruned_before_s:
            return 0
        # Said first: an export must not take a day that is being deleted for whole.
        with self._db_turn, self._db.write() as db:
            db.execute("UPDATE pruned SET before_s = max(before_s, ?)", (day_s,))
        while True:
            with self._db_turn, self._db.write() as db:
                gone = db.execute(
                    "DELETE FROM calls WHERE id IN"
                    " (SELECT id FROM calls WHERE began_s < ? ORDER BY began_s LIMIT ?)",
                    (day_s, _DELETED_AT_ONCE),
                ).rowcount
            deleted += gone
            if gone < _DELETED_AT_ONCE:
                return deleted

    def close(self) -> None:
        """Write what waits, then close the file."""
        try:
            self.flush()
        finally:
            self._db.close()


def exported(row: UsageRow) -> dict[str, Any]:
    """A row for people: the cost as a decimal, exact."""
    told = {name: getattr(row, name) for name in _NAMES if name != "cost_nano"}
    whole, rest = divmod(row.cost_nano, NANO)
    return told | {"cost": f"{whole}.{rest:09d}"}
