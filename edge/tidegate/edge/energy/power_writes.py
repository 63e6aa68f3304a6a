"""Who does the writes that need root: the helper on its socket, or this process where it may.

Both obey the same lines (`tidegate.edge.energy.power_helper`), so that what is refused there is
refused here.
"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Final, Protocol

from tidegate.edge.energy.power_helper import PowerBoard
from tidegate.errors import ActuationError

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
        """Have everything restored; never raises."""


class OwnWrites:
    """Writes by this process, which must have the rights."""

    def __init__(self, sysroot: Path) -> None:
        self._board = PowerBoard(sysroot)

    def ask(self, line: str) -> str:
        """See `PowerWrites.ask`."""
        return _checked(line, self._board.obey(line))

    def close(self) -> None:
        """See `PowerWrites.close`."""
        self._board.restore()


class HelperWrites:
    """Writes by the helper, which restores everything when the connection ends."""

    def __init__(self, path: Path) -> None:
        """Connect.

        Raises:
            ActuationError: there is no helper, or it does not take this process.
        """
        self._path = path
        self._socket = self._connected()

    def ask(self, line: str) -> str:
        """See `PowerWrites.ask`; a helper that was started again is connected to again."""
        if self._socket is None:
            self._socket = self._connected()
        try:
            return _checked(line, self._exchange(self._socket, line))
        except OSError as error:
            self.close()
            raise self._unreachable(error) from error

    def close(self) -> None:
        """See `PowerWrites.close`."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None

    _socket: socket.socket | None

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
        why = "another daemon has it" if isinstance(error, TimeoutError) else str(error)
        return ActuationError(
            f"the power helper at {self._path} does not answer: {why}; start"
            " tidegate-power-helper as root, with a group of this process"
        )


def _checked(line: str, answer: str) -> str:
    kind, _, rest = answer.partition(" ")
    if kind != "ok":
        raise ActuationError(f"the power mode is as it was: {line}: {rest or answer}")
    return rest
