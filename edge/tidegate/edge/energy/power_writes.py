"""Who does the writes that need root: the helper on its socket, or this process where it may.

Both obey the same lines (`tidegate.edge.energy.power_board`), so that what is refused there is
refused here. A change may be under way in a thread when the daemon closes: what is left of it is
then refused, so that nothing is written after all was restored.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from pathlib import Path
from typing import Final, Protocol

from tidegate.edge.energy.power_board import PowerBoard
from tidegate.edge.energy.power_kept import Kept, Refused
from tidegate.errors import ActuationError

_log = logging.getLogger(__name__)

KEPT: Final = Path("run/tidegate-power")
"""Below the root; the folder of the helper's socket as well."""
_ANSWER_S: Final = 15.0
"""That an answer may take: longer than the helper gives nvpmodel."""
_MOST_ANSWER: Final = 4096


class PowerWrites(Protocol):
    """Takes lines of the helper's protocol."""

    def ask(self, line: str) -> str:
        """Send a line; what was read back.

        Raises:
            ActuationError: it was refused, or nobody answers.
        """

    def close(self) -> None:
        """Have everything restored, and take no more lines; never raises."""


class OwnWrites:
    """Writes by this process, which must have the rights.

    What it found is in `KEPT` below the root, where the helper keeps it as well, so that either
    restores what the other could not, and only one of them is at work.
    """

    def __init__(self, sysroot: Path) -> None:
        """Restore what an earlier process left when it was killed.

        Raises:
            ActuationError: another process switches, or what is found cannot be kept.
        """
        folder = sysroot / KEPT
        try:
            if not sysroot.is_dir():
                raise ActuationError(f"{sysroot}: must be a folder with the board's files")
            folder.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._kept = Kept(folder)
        except OSError as error:
            raise ActuationError(f"{folder}: cannot be made: {error.strerror}") from error
        except Refused as why:
            raise ActuationError(
                f"{why}: stop it, or if it is tidegate-power-helper, give --power-helper"
            ) from why
        self._board = PowerBoard(sysroot, self._kept)
        self._one, self._closed = threading.Lock(), False
        _tell(self._board.recover())

    def ask(self, line: str) -> str:
        """See `PowerWrites.ask`."""
        with self._one:
            if self._closed:
                raise _late(line)
            return _checked(line, self._board.obey(line))

    def close(self) -> None:
        """See `PowerWrites.close`; the line that is being written is waited for."""
        with self._one:
            if not self._closed:
                self._closed = True
                _tell(self._board.restore())
                self._kept.close()


def _tell(failed: tuple[str, ...]) -> None:
    for why in failed:
        _log.error("the board is not as it was found: %s", why)


class HelperWrites:
    """Writes by the helper, which restores everything when the connection ends."""

    def __init__(self, path: Path) -> None:
        """Connect.

        Raises:
            ActuationError: there is no helper, or it does not take this process.
        """
        self._path = path
        self._closed = False
        # Over what is connected and not over what is asked, so that `close` waits for no answer.
        self._one = threading.Lock()
        self._socket: socket.socket | None = None
        self._reach("hello")

    def ask(self, line: str) -> str:
        """See `PowerWrites.ask`; a helper that was started again is connected to again."""
        to = self._reach(line)
        try:
            return _checked(line, self._exchange(to, line))
        except OSError as error:
            self._drop()
            if self._closed:
                raise _late(line) from error
            raise self._unreachable(error) from error

    def close(self) -> None:
        """See `PowerWrites.close`; who waits for an answer in another thread is woken."""
        self._closed = True
        self._drop()

    def _reach(self, line: str) -> socket.socket:
        """What is connected, or else a new connection; none once this is closed."""
        to = self._socket
        if to is None and not self._closed:
            to = self._connected()
            with self._one:
                self._socket = to
        if to is None or self._closed:
            self._drop()  # it may have been closed while this connected
            raise _late(line)
        return to

    def _drop(self) -> None:
        with self._one:
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                with contextlib.suppress(OSError):
                    self._socket.close()
                self._socket = None

    def _connected(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(_ANSWER_S)
        try:
            made.connect(str(self._path))
            _checked("hello", self._exchange(made, "hello"))
        except OSError as error:
            made.close()
            raise self._unreachable(error) from error
        except ActuationError:
            made.close()
            raise
        return made

    def _exchange(self, to: socket.socket, line: str) -> str:
        to.sendall(line.encode("ascii") + b"\n")
        held = b""
        while not held.endswith(b"\n"):
            data = to.recv(_MOST_ANSWER)
            if not data or len(held) > _MOST_ANSWER:
                raise ConnectionResetError("the helper ended the connection")
            held += data
        return held.decode("utf-8", "replace").strip()

    def _unreachable(self, error: OSError) -> ActuationError:
        return ActuationError(
            f"the power helper at {self._path} does not answer: {error}; start"
            " tidegate-power-helper as root, with a group of this process"
        )


def _late(line: str) -> ActuationError:
    return ActuationError(f"the power mode is as it was found: {line}: the daemon is closing")


def _checked(line: str, answer: str) -> str:
    kind, _, rest = answer.partition(" ")
    if kind != "ok":
        raise ActuationError(f"the power mode is as it was: {line}: {rest or answer}")
    return rest
