"""How every SQLite file of the link is opened and written: private, durable, forgetting for good.

WAL with synchronous=FULL: a transaction that returned is on the disk. What is deleted is
overwritten (`secure_delete`).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tidegate.errors import TidegateError

_SETTINGS = ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON")


def open_file(path: Path) -> sqlite3.Connection:
    """Open or make the file at `path`, mode 0600; for one thread at a time, in autocommit.

    Raises:
        OSError, sqlite3.Error: it cannot be opened or is no database.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Made here and not by SQLite: never, not even at first, may others read it.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    path.chmod(0o600)
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        for setting in _SETTINGS:
            db.execute(f"PRAGMA {setting}")
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def transaction(
    db: sqlite3.Connection, failed: Callable[[sqlite3.Error], TidegateError]
) -> Iterator[sqlite3.Connection]:
    """One write: all of it or, after an error or a crash, none of it; other writers wait.

    Raises:
        TidegateError: what `failed` makes of SQLite's error.
    """
    try:
        db.execute("BEGIN IMMEDIATE")
        yield db
        db.execute("COMMIT")
    except BaseException as error:
        with suppress(sqlite3.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error):
            raise failed(error) from error
        raise
