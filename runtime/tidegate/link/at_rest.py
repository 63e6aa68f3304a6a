"""What both stores share: an SQLite file that survives a crash, and sealing of what is in it.

WAL with synchronous=FULL: a transaction that returned is on the disk. One that may be lost with
the machine's power, but not with the process, says `synced=False`. The log is in order: a power cut
takes the newest writes, and a synced one puts all that came before it on the disk as well.

Content columns are sealed under a local 0600 key beside the file, so a copied database alone says
nothing; each value is bound to its row and column. What is deleted is overwritten
(`secure_delete`), and `sweep` empties the log, which would otherwise keep it.

A schema is a sequence of steps. A file counts in `user_version` how many of them it has; each step
and its count are one transaction, so one that was interrupted starts over.
"""

from __future__ import annotations

import hmac
import secrets
import sqlite3
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from tidegate.errors import CapacityError, LinkError
from tidegate.link.keyfiles import load_or_make_key
from tidegate.link.sqlite_file import open_file, transaction

Schema = Sequence[Sequence[str]]
"""Steps of SQL statements. Steps are only ever added: a released one never changes."""

_NONCE_BYTES = 12
SEALED_OVERHEAD_BYTES = _NONCE_BYTES + 16
_ROWS_KEPT = 1024
"""Ciphers of rows that are written to again and again, as an answer is while it grows."""


class RestCipher:
    """Seals values under a key derived for their row, so that random nonces never run out."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._aeads: OrderedDict[bytes, ChaCha20Poly1305] = OrderedDict()

    def seal(self, row: bytes, column: str, data: bytes) -> bytes:
        return self.seal_all([(row, column, data)])[0]

    def seal_all(self, values: Sequence[tuple[bytes, str, bytes]]) -> list[bytes]:
        """Seal many values, each given as its row, its column and its data."""
        # One call for all nonces: each would hand the interpreter to another thread.
        nonces = secrets.token_bytes(_NONCE_BYTES * len(values))
        sealed = []
        for at, (row, column, data) in enumerate(values):
            nonce = nonces[at * _NONCE_BYTES : (at + 1) * _NONCE_BYTES]
            sealed.append(nonce + self._aead(row).encrypt(nonce, data, column.encode()))
        return sealed

    def forget(self, row: bytes) -> None:
        """The row has gone, or nothing will be written to it for long."""
        self._aeads.pop(row, None)

    def open(self, row: bytes, column: str, sealed: bytes) -> bytes:
        """Undo `seal`.

        Raises:
            LinkError: written under another key, or damaged.
        """
        try:
            return self._aead(row).decrypt(
                sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], column.encode()
            )
        except InvalidTag:
            raise LinkError("a stored value is damaged or was written with another key") from None

    def fingerprint(self, column: str, data: bytes) -> bytes:
        """16 bytes that stand for `data`, to look it up by; without the key they say nothing."""
        key = HKDFExpand(hashes.SHA256(), 32, b"tidegate/1 fingerprint").derive(self._key)
        return hmac.digest(key, column.encode() + b"\0" + data, "sha256")[:16]

    def _aead(self, row: bytes) -> ChaCha20Poly1305:
        known = self._aeads.get(row)
        if known is not None:
            return known
        info = b"tidegate/1 rest" + row
        aead = ChaCha20Poly1305(HKDFExpand(hashes.SHA256(), 32, info).derive(self._key))
        self._aeads[row] = aead
        if len(self._aeads) > _ROWS_KEPT:
            self._aeads.popitem(last=False)
        return aead


class Database:
    """One SQLite file and its cipher. Used by one thread at a time.

    Raises:
        LinkError: the file is no database of ours, its key is another one, or a newer release
            wrote it.
        IdentityError: the key file cannot be used.
    """

    def __init__(self, path: Path, schema: Schema) -> None:
        self.cipher = RestCipher(load_or_make_key(path.with_suffix(".key")))
        try:
            self._db = open_file(path)
        except (OSError, sqlite3.Error) as error:
            raise LinkError(f"{path}: cannot be used as a store ({error})") from error
        self._synced = True
        try:
            version = self._version(path, schema)
            self._check_key(path)
            self._migrate(schema, version)
        except (sqlite3.DatabaseError, CapacityError) as error:
            self._db.close()
            raise LinkError(f"{path}: cannot be used as a store ({error})") from error
        except BaseException:
            self._db.close()
            raise

    def _version(self, path: Path, schema: Schema) -> int:
        """How many steps of the schema the file has."""
        ((version,),) = self._db.execute("PRAGMA user_version").fetchall()
        if version > len(schema):
            raise LinkError(
                f"{path}: schema version {version}: this release reads up to {len(schema)};"
                " use the newer release, or move the file away"
            )
        return int(version)

    def _check_key(self, path: Path) -> None:
        with self.write() as db:
            db.execute("CREATE TABLE IF NOT EXISTS canary (sealed BLOB NOT NULL)")
            row = db.execute("SELECT sealed FROM canary").fetchone()
            if row is None:
                sealed = self.cipher.seal(b"", "canary", b"")
                db.execute("INSERT INTO canary VALUES (?)", (sealed,))
                return
        try:
            self.cipher.open(b"", "canary", row[0])
        except LinkError as error:
            raise LinkError(
                f"{path}: was written with another key than {path.with_suffix('.key').name}"
            ) from error

    def _migrate(self, schema: Schema, version: int) -> None:
        for number in range(version, len(schema)):
            with self.write() as db:
                for statement in schema[number]:
                    self._run(db, statement)
                db.execute(f"PRAGMA user_version = {number + 1}")

    def _run(self, db: sqlite3.Connection, statement: str) -> None:
        db.execute(statement)

    def _set_synced(self, synced: bool) -> None:
        """Whether the transactions from now on are on the disk when they return."""
        if synced is not self._synced:
            self._db.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
            self._synced = synced

    @contextmanager
    def write(self, *, synced: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or, after an error or a crash, none of it.

        Args:
            synced: it is on the disk when this returns. If not, it outlives the process but
                perhaps not the machine's power, and then neither does any later one that was not
                synced.

        Raises:
            CapacityError: the disk is full, the file is locked or damaged.
        """
        try:
            self._set_synced(synced)
        except sqlite3.Error as error:
            raise _not_written(error) from error
        with transaction(self._db, _not_written) as db:
            yield db

    def read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """The rows of `query`.

        Raises:
            CapacityError: the file cannot be read.
        """
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise CapacityError(f"the store cannot be read ({error})") from error

    def sweep(self) -> None:
        """Empty the write-ahead log, so that no copy of what was deleted stays in it."""
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        self._db.close()


def _not_written(error: sqlite3.Error) -> CapacityError:
    return CapacityError(f"the store cannot be written ({error})")
