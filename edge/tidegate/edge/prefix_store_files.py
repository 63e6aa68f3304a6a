"""The files of the prefix store: one per unit of KV, sealed, named by its key.

KV gives prompts away, so every file is encrypted and authenticated under a local key beside it,
bound to its name and to the version of the format, and nobody else may read it (0600). What was
cut short, changed, renamed or written by another version does not open. Nothing is fsynced: after
a power cut a file is whole or does not open, and both are fine for a cache. The folder itself is
the index, its modification times the order of use: a database could disagree with the files after
a crash, and a directory of some thousand names reads in milliseconds.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tidegate.errors import ConfigError, LinkError
from tidegate.link.at_rest import SEALED_OVERHEAD_BYTES, RestCipher
from tidegate.link.keyfiles import load_or_make_key

MAGIC: Final = b"tidegate kv 1\n"
OVERHEAD_BYTES: Final = len(MAGIC) + SEALED_OVERHEAD_BYTES

_UNIT = re.compile(r"[0-9a-f]{32}\.kv")
_HALF_WRITTEN = re.compile(r"\.[0-9a-f]{32}\.kv\.[0-9a-f]{8}")
_COLUMN = "kv"


class DamagedUnitError(Exception):
    """A file is not what was written under its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitFile:
    """One file of the folder; `used_ns` is when it was last of use, as its modification time."""

    key: bytes
    file_bytes: int
    used_ns: int


class UnitFolder:
    """A folder that this process alone works with, until `close` or its end."""

    def __init__(self, folder: Path) -> None:
        """Make the folder and its key if need be, and lock it.

        Raises:
            OSError: it cannot be made or written.
            ConfigError: another process has it.
            LinkError: its key cannot be used.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock: int | None = lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._cipher = RestCipher(load_or_make_key(folder / "prefix.key"))
        except BlockingIOError:
            os.close(lock)
            allowed = "a folder of its own: another process keeps its prefixes there"
            raise ConfigError("prefix_cache", str(folder), allowed) from None
        except BaseException:
            os.close(lock)
            raise

    def units(self) -> list[UnitFile]:
        """Every unit's file, the longest unused first; removes what a killed writer left.

        Files with names that are not ours stay, whatever they are.
        """
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if _HALF_WRITTEN.fullmatch(entry.name):
                    os.unlink(entry.path)
                elif _UNIT.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    facts = entry.stat(follow_symlinks=False)
                    key = bytes.fromhex(entry.name.removesuffix(".kv"))
                    found.append(
                        UnitFile(key=key, file_bytes=facts.st_size, used_ns=facts.st_mtime_ns)
                    )
        return sorted(found, key=lambda unit: unit.used_ns)

    def write(self, key: bytes, data: bytes, used_ns: int) -> int:
        """Write a unit whole or not at all, and return the bytes of its file.

        Raises:
            OSError: the disk is full, or refuses.
        """
        path = self._path(key)
        half = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        sealed = self._cipher.seal(key, _COLUMN, data)
        descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(MAGIC)
                file.write(sealed)
            os.utime(half, ns=(used_ns, used_ns))
            half.replace(path)
        except BaseException:
            half.unlink(missing_ok=True)
            raise
        return len(MAGIC) + len(sealed)

    def read(self, key: bytes) -> bytes:
        """The unit as it was written.

        Raises:
            OSError: there is no such file, or it cannot be read.
            DamagedUnitError: it is not what was written.
        """
        content = self._path(key).read_bytes()
        if not content.startswith(MAGIC) or len(content) < OVERHEAD_BYTES:
            raise DamagedUnitError(self._path(key).name)
        try:
            return self._cipher.open(key, _COLUMN, content[len(MAGIC) :])
        except LinkError as error:
            raise DamagedUnitError(self._path(key).name) from error

    def used(self, key: bytes, used_ns: int) -> None:
        """Note when a unit was of use; one that is gone is fine."""
        try:
            os.utime(self._path(key), ns=(used_ns, used_ns))
        except FileNotFoundError:
            return

    def remove(self, key: bytes) -> None:
        """Remove a unit; one that is gone is fine."""
        self._path(key).unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process have the folder; a second time it does nothing."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{key.hex()}.kv"
