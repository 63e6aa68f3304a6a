"""The processes a run starts and kills: mosquitto, gateway, device. Only its own, by pid."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Literal

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PARTS = ("runtime", "edge", "cloud", "kernels", "converters", "sdk", "firmware-profiles")
SUPPORT = ROOT / "tests" / "support"
_PR_SET_PDEATHSIG = 1

Process = subprocess.Popen[bytes]
Output = IO[bytes] | int | None
Role = Literal["broker", "gateway", "device"]
ROLES: tuple[Role, ...] = ("broker", "gateway", "device")


def import_paths() -> list[str]:
    """Where this checkout's own packages lie, before any installed ones."""
    return [*(str(ROOT / part) for part in PARTS), str(SUPPORT)]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def start(command: Sequence[str], *, stdout: Output, stderr: Output = None) -> Process:
    """Start a process that imports from this checkout and does not outlive us."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(import_paths())}
    return subprocess.Popen(
        command,
        stdout=stdout,
        stderr=stderr,
        env=environment,
        preexec_fn=_die_with_parent,
    )


class Child:
    """One process, started again after every kill. Its words go to a log."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self._command = list(command)
        self._log = log
        self._process: Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def ended(self) -> int | None:
        """Its exit status when it ended by itself."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        assert self._process is None
        with self._log.open("ab") as log:
            self._process = start(self._command, stdout=log, stderr=log)

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nobody is told."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)
            self._process = None


def python(*arguments: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, "-P", *arguments]


def mosquitto(folder: Path, port: int) -> Child:
    """A broker on loopback that keeps its store on disk, written every second.

    Raises:
        SystemExit: it is not installed.
    """
    program = shutil.which(
        "mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/opt/homebrew/sbin"
    )
    if program is None:
        raise SystemExit("mosquitto is not installed (Debian package `mosquitto`)")
    store = folder / "broker"
    store.mkdir(exist_ok=True)
    config = folder / "mosquitto.conf"
    lines = [
        f"listener {port} 127.0.0.1",
        "allow_anonymous true",
        "set_tcp_nodelay true",
        "persistence true",
        f"persistence_location {store}/",
        "autosave_interval 1",
        "max_queued_messages 0",
        # With a limit, paho at QoS 2 never gets back in after a broker's death: it sends its whole
        # backlog again, more than the limit, and is thrown out for it, again and again.
        "max_inflight_messages 0",
    ]
    if os.getuid() == 0:
        lines.append("user root")
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Child("broker", [program, "-c", str(config)], folder / "broker.log")


def wait_listening(port: int, timeout_s: float = 20.0) -> None:
    """Until a connection to loopback's `port` succeeds.

    Raises:
        TimeoutError: nobody listens.
    """
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise TimeoutError(f"nothing listens on port {port} after {timeout_s:g} s")


def free_port() -> int:
    """A port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
