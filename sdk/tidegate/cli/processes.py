"""Starts our own services as child processes, waits until they are up, and ends them all.

Each child announces itself with one line on stdout that ends in its URL; its stderr goes to a log
file whose end is shown when it fails to start.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, Queue
from types import TracebackType
from typing import Self

from tidegate.errors import UnavailableError

_START_S = 60.0
_STOP_S = 15.0


class Processes:
    """Child processes that end, last started first, when the `with` block does."""

    def __init__(self, log_folder: Path) -> None:
        """Keep the children's logs in `log_folder`, which must exist."""
        self._log_folder = log_folder
        self._children: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in reversed(self._children):
            child.terminate()
            try:
                child.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdout is not None:
                child.stdout.close()

    def start(self, name: str, arguments: Sequence[str]) -> str:
        """Run `tidegate ARGUMENTS` and return the URL that it announces.

        Raises:
            UnavailableError: it ended or said nothing in time; with the end of its log.
        """
        log = self._log_folder / f"{name}.log"
        with log.open("w") as errors:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "tidegate.cli", *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                text=True,
            )
        self._children.append(child)
        url = _announced_url(child)
        if url is None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise UnavailableError(f"{name} did not start; the end of {log}:\n{tail}")
        return url

    def check(self) -> None:
        """Raise `UnavailableError` if a child has ended by itself."""
        for child in self._children:
            if child.poll() is not None:
                raise UnavailableError(f"a service ended with status {child.returncode}")


def _announced_url(child: subprocess.Popen[str]) -> str | None:
    """The last word of the child's first line; None when it ends, or is silent for too long."""
    lines: Queue[str] = Queue()
    stdout = child.stdout
    assert stdout is not None
    # A thread, because a pipe cannot be read with a timeout in a portable way.
    threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
    try:
        words = lines.get(timeout=_START_S).split()
    except Empty:
        return None
    return words[-1] if words else None
