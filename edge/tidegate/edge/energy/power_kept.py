"""What was found of clocks and power modes, in a file that outlives the process that wrote it.

Whoever is killed cannot restore; whoever begins next reads the file and does. Python's own modules
only, since root runs it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path

KINDS = ("nvpmodel", "governor", "epp", "freq")
"""In the order of restoring: a mode sets clocks, a governor decides what preferences there are."""
_MOST_FILE = 1 << 20


class Refused(Exception):  # noqa: N818 - an answer, not a failure
    """Why something is not done, in words for the client."""


Found = dict[tuple[str, int], str]
"""What was there before: by what it is and the number of its policy (0 for nvpmodel's mode)."""


class Kept:
    """What was found, in a file of one process at a time; it goes when everything is restored.

    /run is the place for it: after a reboot clocks are what they were anyway.
    """

    def __init__(self, folder: Path) -> None:
        """Have the folder to oneself, until `close`.

        Args:
            folder: that is there.

        Raises:
            Refused: another process has it, or it cannot be written.
        """
        self._file = folder / "found.json"
        self._lock: int | None = None
        try:
            self._lock = _opened(folder / "lock", os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise Refused(f"{folder}: another process switches power modes here") from None
        except OSError as error:
            raise Refused(f"{folder}: what is found cannot be kept: {error.strerror}") from error

    def read(self) -> Found:
        """What a process that was killed has left; raises `Refused`."""
        try:
            opened = _opened(self._file, os.O_RDONLY)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise Refused(f"{self._file}: cannot be read: {error.strerror}") from error
        with os.fdopen(opened, "rb") as file:
            owner, text = os.fstat(opened).st_uid, file.read(_MOST_FILE)
        try:
            told = json.loads(text)
            found = {(str(what), int(number)): str(value) for what, number, value in told}
        except (ValueError, TypeError) as error:
            raise Refused(f"{self._file}: is no list of what was found") from error
        if owner != os.geteuid() or any(what not in KINDS for what, _ in found):
            raise Refused(f"{self._file}: was not written by this program")
        return found

    def write(self, found: Mapping[tuple[str, int], str]) -> None:
        """Replace what the file says, at once or not at all; raises `Refused`."""
        try:
            if not found:
                self._file.unlink(missing_ok=True)
                return
            new = self._file.with_suffix(".new")
            new.unlink(missing_ok=True)
            opened = _opened(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            with os.fdopen(opened, "w", encoding="utf-8") as file:
                json.dump([(*key, value) for key, value in found.items()], file)
            new.replace(self._file)
        except OSError as error:
            raise Refused(f"{self._file}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _opened(file: Path, flags: int) -> int:
    """A file of ours only; a link is not followed."""
    return os.open(file, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
