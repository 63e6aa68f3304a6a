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
    _make_private(path)
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        for setting in _SETTINGS:
            db.execute(f"PRAGMA {setting}")
    except BaseException:
        db.close()
        raise
    return db


def _make_private(path: Path) -> None:
    """Made here and not by SQLite: never, not even at first, may others read it.

    A file that is there is not opened here: closing it would drop the locks of every connection
    that this process has on it (fcntl(2)), and the next process to leave the file would then take
    itself for the last one and delete the log under us (sqlite.org/howtocorrupt.html, 2.2).
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if path.is_file():
            path.chmod(0o600)


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
