"""Who asked what and when, without a word of it: JSON lines in the service's state folder.

`audit.jsonl` grows to a bound or until midnight (UTC), is then renamed to `audit-TIME.jsonl` and a
new one begun; old ones are deleted by age and by the bytes of all. Lines wait in memory for about a
second and are then written and synced together: that is what a crash or a power cut may lose.
Several processes may share a folder: whoever appends or rotates holds a lock.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from tidegate.errors import ConfigError

_log = logging.getLogger(__name__)

FILE: Final = "audit.jsonl"
MOST_WAITING: Final = 20_000
"""Lines that wait for a disk that takes none; further ones are counted, and told in a line."""
_PRUNE_S: Final = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditSettings:
    """How long lines are kept.

    Raises:
        ConfigError: a bound is not positive.
    """

    file_bytes: int = 16 << 20
    keep_days: float = 90.0
    keep_bytes: int = 1 << 30
    """Of all files that are not written any more."""

    def __post_init__(self) -> None:
        for name in ("file_bytes", "keep_days", "keep_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"audit {name}", getattr(self, name), "above 0")


class AuditLog:
    """See the module. `add` from the event loop, `flush` from one thread at a time."""

    def __init__(self, folder: Path, settings: AuditSettings) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self._settings = folder, settings
        self._waiting: list[str] = []
        self._dropped = 0
        self._pruned_s = 0.0
        self._turn = threading.Lock()

    def add(self, line: Mapping[str, object]) -> None:
        """Keep a line for the next `flush`."""
        with self._turn:
            if len(self._waiting) >= MOST_WAITING:
                self._dropped += 1
                return
            self._waiting.append(json.dumps(line, ensure_ascii=True, separators=(",", ":")))

    def flush(self, *, now_s: float | None = None) -> None:
        """Write what waits, rotate and delete; a disk that refuses is logged and tried again."""
        with self._turn:
            lines, dropped = self._waiting, self._dropped
            self._waiting, self._dropped = [], 0
        if dropped:
            lines.append(json.dumps({"event": "dropped", "lines": dropped}))
        now_s = time.time() if now_s is None else now_s
        try:
            with self._locked():
                if lines:
                    self._rotate(now_s)
                    self._append("".join(line + "\n" for line in lines).encode())
                    lines = []
                if now_s - self._pruned_s >= _PRUNE_S:
                    self._prune(now_s)
                    self._pruned_s = now_s
        except OSError as error:
            _log.error("audit log: cannot be written (%s)", error.strerror)
            with self._turn:
                self._waiting = lines + self._waiting

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._folder / "audit.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _append(self, data: bytes) -> None:
        path = self._folder / FILE
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        began = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, data) < len(data):
                os.ftruncate(descriptor, began)  # a full disk: no half line, the batch waits
                raise OSError(28, "no space left")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _rotate(self, now_s: float) -> None:
        """Begin a new file when this one is full, or from another day: none has lines of two."""
        path = self._folder / FILE
        try:
            facts = path.stat()
        except FileNotFoundError:
            return
        days = {datetime.fromtimestamp(at_s, UTC).date() for at_s in (now_s, facts.st_mtime)}
        if facts.st_size >= self._settings.file_bytes or len(days) > 1:
            stamp = datetime.fromtimestamp(now_s, UTC).strftime("%Y%m%dT%H%M%S.%f")
            path.rename(self._folder / f"audit-{stamp}.jsonl")
            self._pruned_s = 0.0

    def _prune(self, now_s: float) -> None:
        kept_bytes, oldest_s = 0, now_s - self._settings.keep_days * 86_400
        for one in sorted(self._folder.glob("audit-*.jsonl"), reverse=True):  # the youngest first
            facts = one.stat()
            kept_bytes += facts.st_size
            if kept_bytes > self._settings.keep_bytes or facts.st_mtime < oldest_s:
                one.unlink()
