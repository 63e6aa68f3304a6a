"""What both stores share: an SQLite file that survives a crash, and sealing of what is in it.

WAL with synchronous=FULL: a transaction that returned is on the disk. Content columns are sealed
under a local 0600 key beside the file, so a copied database alone says nothing; each value is
bound to its row and column.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from tidegate.errors import CapacityError, LinkError
from tidegate.link.keyfiles import load_or_make_key

_NONCE_BYTES = 12
SEALED_OVERHEAD_BYTES = _NONCE_BYTES + 16


class RestCipher:
    """Seals values under a key derived for their row, so that random nonces never run out."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def seal(self, row: bytes, column: str, data: bytes) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._aead(row).encrypt(nonce, data, column.encode())

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

    def _aead(self, row: bytes) -> ChaCha20Poly1305:
        info = b"tidegate/1 rest" + row
        return ChaCha20Poly1305(HKDFExpand(hashes.SHA256(), 32, info).derive(self._key))


class Database:
    """One SQLite file and its cipher. Used by one thread at a time.

    Raises:
        LinkError: the file is no database of ours, or its key is another one.
        IdentityError: the key file cannot be used.
    """

    def __init__(self, path: Path, schema: str) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.cipher = RestCipher(load_or_make_key(path.with_suffix(".key")))
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise LinkError(f"{path}: cannot be used as a store ({error})") from error
        try:
            path.chmod(0o600)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(schema)
            self._check_key(path)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise LinkError(f"{path}: cannot be used as a store ({error})") from error
        except BaseException:
            self._db.close()
            raise

    def _check_key(self, path: Path) -> None:
        self._db.execute("CREATE TABLE IF NOT EXISTS canary (sealed BLOB NOT NULL)")
        row = self._db.execute("SELECT sealed FROM canary").fetchone()
        if row is None:
            sealed = self.cipher.seal(b"", "canary", b"")
            self._db.execute("INSERT INTO canary VALUES (?)", (sealed,))
            return
        try:
            self.cipher.open(b"", "canary", row[0])
        except LinkError as error:
            raise LinkError(
                f"{path}: was written with another key than {path.with_suffix('.key').name}"
            ) from error

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or, after an error or a crash, none of it.

        Raises:
            CapacityError: the disk is full, the file is locked or damaged.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            self._db.execute("COMMIT")
        except BaseException as error:
            with suppress(sqlite3.Error):
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise CapacityError(f"the link's store cannot be written ({error})") from error
            raise

    def read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """The rows of `query`.

        Raises:
            CapacityError: the file cannot be read.
        """
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise CapacityError(f"the link's store cannot be read ({error})") from error

    def close(self) -> None:
        self._db.close()
