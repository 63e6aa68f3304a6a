"""`FolderStore`: the disk tier's units in a folder, within a number of bytes, written by a thread.

It is a cache and behaves like one: what cannot be read is removed and counted, never an error for a
request; a disk that cannot be written ends the writing with one line in the log, and what is there
is still read. The thread sleeps on its queue and wakes for work only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from tidegate.edge.prefix_store_files import OVERHEAD_BYTES, DamagedUnitError, UnitFolder
from tidegate.engine.exit_threads import start_until_exit
from tidegate.engine.prefix_disk import StoreNumbers
from tidegate.errors import LinkError

_log = logging.getLogger(__name__)

MOST_QUEUED_BYTES = 32 << 20
"""Copied out of the KV and not yet on the disk."""
_CLOSE_S = 10.0
"""For what is queued when the process ends; a disk that hangs does not keep it longer."""

_Work = tuple[bytes, bytes | None, int]
"""A key, its unit or None if it was only of use, and when."""


def open_store(folder: Path, *, budget_bytes: int) -> FolderStore | NoStore:
    """The store in `folder`, or one that keeps nothing where that cannot be written.

    Raises:
        ConfigError: another process has the folder.
    """
    try:
        units = UnitFolder(folder)
        try:
            return FolderStore(units, budget_bytes=budget_bytes)
        except BaseException:
            units.close()
            raise
    except (OSError, LinkError) as error:
        _log.warning("prefixes are not kept on disk: %s: %s", folder, error)
        return NoStore()


class NoStore:
    """See `PrefixStore`: a disk tier that is off, and says so in its numbers."""

    def holds(self, key: bytes) -> bool:
        """Never."""
        return False

    def load(self, key: bytes) -> bytes | None:
        """Nothing."""
        return None

    def save(self, key: bytes, data: bytes) -> None:
        """Not kept."""

    def use(self, keys: tuple[bytes, ...]) -> None:
        """There are none."""

    def room_bytes(self) -> int:
        """None."""
        return 0

    def numbers(self) -> StoreNumbers:
        """One error: the one that turned it off."""
        return StoreNumbers(errors=1, writing=False)

    def close(self) -> None:
        """Nothing is open."""


class FolderStore:
    """See `PrefixStore`. `close` writes what is queued and lets the folder go."""

    def __init__(self, folder: UnitFolder, *, budget_bytes: int) -> None:
        """Read which units there are; those beyond the budget go.

        Args:
            folder: is this store's from now on.
            budget_bytes: of all files together.

        Raises:
            OSError: the folder cannot be read.
        """
        self._folder, self._budget_bytes = folder, budget_bytes
        self._lock = threading.Lock()
        # The longest unused first.
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        self._queued: dict[bytes, bytes] = {}
        self._kept_bytes = self._queued_bytes = self._newest_ns = 0
        self._writes = self._evictions = self._errors = 0
        self._writing = True
        for unit in folder.units():
            self._kept[unit.key] = unit.file_bytes
            self._kept_bytes += unit.file_bytes
            self._newest_ns = unit.used_ns
        with self._lock:
            gone = self._evict(0)
        self._remove(gone)
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tidegate-prefixes", daemon=True)
        start_until_exit(self._thread, partial(self._work.put, None))

    def holds(self, key: bytes) -> bool:
        """See `PrefixStore.holds`."""
        return key in self._kept or key in self._queued

    def load(self, key: bytes) -> bytes | None:
        """See `PrefixStore.load`."""
        with self._lock:
            if key in self._queued:
                return self._queued[key]
        try:
            return self._folder.read(key)
        except FileNotFoundError:
            self._forget(key)
        except (OSError, DamagedUnitError) as error:
            _log.warning("a kept prefix cannot be read and is removed: %s", error)
            self._forget(key, is_error=True)
        return None

    def save(self, key: bytes, data: bytes) -> None:
        """See `PrefixStore.save`."""
        with self._lock:
            if self.holds(key) or not self._writing:
                return
            self._queued[key] = data
            self._queued_bytes += len(data)
            self._work.put((key, data, self._now_ns()))

    def use(self, keys: tuple[bytes, ...]) -> None:
        """See `PrefixStore.use`."""
        with self._lock:
            # From the end: without its beginning the rest of a prefix is of no use.
            for key in reversed(keys):
                if key in self._kept:
                    self._kept.move_to_end(key)
                if self.holds(key):
                    self._work.put((key, None, self._now_ns()))

    def room_bytes(self) -> int:
        """See `PrefixStore.room_bytes`."""
        return max(0, MOST_QUEUED_BYTES - self._queued_bytes) if self._writing else 0

    def numbers(self) -> StoreNumbers:
        """See `PrefixStore.numbers`."""
        with self._lock:
            return StoreNumbers(
                kept_bytes=self._kept_bytes,
                units=len(self._kept),
                writes=self._writes,
                evictions=self._evictions,
                errors=self._errors,
                writing=self._writing,
            )

    def close(self) -> None:
        """Write what is queued, for at most some seconds; another process may use it then."""
        self._work.put(None)
        self._thread.join(_CLOSE_S)
        if not self._thread.is_alive():
            self._folder.close()

    def _now_ns(self) -> int:
        """Later than any time in the folder, even where the clock starts in 1970 at every boot."""
        self._newest_ns = max(self._newest_ns + 1, time.time_ns())
        return self._newest_ns

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            key, data, used_ns = work
            try:
                if data is None:
                    self._folder.used(key, used_ns)
                    continue
                self._write(key, data, used_ns)
            except Exception as error:  # the boundary of the thread: the disk, or its own defect
                self._stop_writing(error)
            finally:
                if data is not None:
                    with self._lock:
                        del self._queued[key]
                        self._queued_bytes -= len(data)

    def _write(self, key: bytes, data: bytes, used_ns: int) -> None:
        file_bytes = len(data) + OVERHEAD_BYTES
        if not self._writing:
            return
        if file_bytes > self._budget_bytes:
            raise ValueError(f"a unit of {file_bytes} bytes: at most {self._budget_bytes} are kept")
        with self._lock:
            gone = self._evict(file_bytes)
        self._remove(gone)
        self._folder.write(key, data, used_ns)
        with self._lock:
            self._kept[key] = file_bytes
            self._kept_bytes += file_bytes
            self._writes += 1

    def _stop_writing(self, error: Exception) -> None:
        with self._lock:
            first, self._writing = self._writing, False
            self._errors += 1
        if first:
            _log.warning("no more prefixes are kept on disk: %s", error)

    def _evict(self, more_bytes: int) -> list[bytes]:
        """Make room in the books; the caller has the lock, and removes these without it.

        A disk may take its time to remove a file, and the event loop asks for the numbers.
        """
        gone = []
        while self._kept and self._kept_bytes + more_bytes > self._budget_bytes:
            key, file_bytes = self._kept.popitem(last=False)
            self._kept_bytes -= file_bytes
            self._evictions += 1
            gone.append(key)
        return gone

    def _remove(self, keys: list[bytes]) -> None:
        for key in keys:
            self._folder.remove(key)

    def _forget(self, key: bytes, *, is_error: bool = False) -> None:
        with self._lock:
            self._kept_bytes -= self._kept.pop(key, 0)
            self._errors += is_error
        try:
            self._folder.remove(key)
        except OSError as error:
            self._stop_writing(error)
