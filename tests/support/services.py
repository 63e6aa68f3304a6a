"""Real processes for system tests: `tidegate` commands and mosquitto, ended whatever happens.

Every wait is bounded and everything listens on loopback. A service announces itself with one line
on stdout whose last word is its URL; its stderr goes to a log that a failing test shows.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

START_S = 120.0
"""Importing a model runtime on a machine with two busy cores takes seconds."""
STOP_S = 40.0

TIDEGATE = (sys.executable, "-P", "-m", "tidegate.cli")


def until(condition: Callable[[], bool], what: str, *, within_s: float = 20.0) -> None:
    """Poll until `condition` holds."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        time.sleep(0.03)


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_tidegate(*arguments: str, within_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself."""
    return subprocess.run(
        [*TIDEGATE, *arguments], capture_output=True, text=True, timeout=within_s, check=False
    )


@dataclass(kw_only=True)
class Service:
    """One child process."""

    name: str
    process: subprocess.Popen[str]
    url: str
    log: Path

    def kill(self) -> None:
        """SIGKILL: no goodbye, nothing flushed."""
        self.process.kill()
        self.process.wait(STOP_S)

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)

    def close(self) -> None:
        """End it whatever its state is."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(STOP_S)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def get(self, path: str) -> Any:
        """The JSON of a GET."""
        return httpx.get(f"{self.url}{path}", timeout=10).json()

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels; 0 when it is not there yet."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    @property
    def running(self) -> float:
        """Requests in the engine's batch."""
        return self.metric("tidegate_num_requests_running")


@dataclass
class Services:
    """Ends, last started first, whatever was started with it when the `with` block does."""

    folder: Path
    _started: list[Service] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for service in reversed(self._started):
            service.close()
        if error is not None:
            for service in self._started:
                tail = service.log.read_text(errors="replace").splitlines()[-15:]
                sys.stderr.write(f"--- end of {service.name}'s log\n" + "\n".join(tail) + "\n")

    def tidegate(self, name: str, *arguments: str, within_s: float = START_S) -> Service:
        """Start `tidegate ARGUMENTS` and wait until it announces its URL."""
        return self.announced(name, [*TIDEGATE, *arguments], within_s=within_s)

    def announced(self, name: str, command: Sequence[str], *, within_s: float = START_S) -> Service:
        """Start any program that announces itself as `tidegate` does."""
        service = self._start(name, command, announces=True)
        line = _first_line(service.process, within_s)
        if not line.split():
            service.process.send_signal(signal.SIGABRT)  # its stacks go to the log
            service.process.wait(STOP_S)
            log = service.log.read_text(errors="replace")
            raise AssertionError(f"{name} did not start within {within_s:g} s:\n{log}")
        service.url = line.split()[-1]
        return service

    def serve(self, bundle: Path, *arguments: str) -> Service:
        """A device daemon on a free port, one thread."""
        common = ("--listen", "127.0.0.1:0", "--threads", "1")
        return self.tidegate("device", "serve", str(bundle), *common, *arguments)

    def cloud(self, checkpoint: Path, *arguments: str) -> Service:
        """A cloud service on a free port, one thread."""
        common = ("--listen", "127.0.0.1:0", "--threads", "1")
        return self.tidegate("cloud", "cloud", str(checkpoint), *common, *arguments)

    def mosquitto(self, port: int | None = None, *, config: Path | None = None) -> Service:
        """The broker that production runs, without persistence: what it forgets is forgotten.

        Or with the `config` of `tidegate broker config`, which listens on `port` with TLS. Skips
        the test where mosquitto is not installed.
        """
        program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
        if not Path(program).exists():
            pytest.skip("mosquitto is not installed (Debian package mosquitto)")
        port = port or free_port()
        scheme = "mqtt" if config is None else "mqtts"
        if config is None:
            config = self.folder / f"mosquitto-{port}.conf"
            lines = ("allow_anonymous true", "persistence false", "")
            config.write_text("\n".join((f"listener {port} 127.0.0.1", *lines)))
        service = self._start("mosquitto", [program, "-c", str(config)], announces=False)
        service.url = f"{scheme}://127.0.0.1:{port}"
        until(lambda: _accepts(port), "mosquitto listens")
        return service

    def _start(self, name: str, command: Sequence[str], *, announces: bool) -> Service:
        log = self.folder / f"{name}-{len(self._started)}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if announces else errors,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONFAULTHANDLER": "1"},
            )
        service = Service(name=name, process=process, url="", log=log)
        self._started.append(service)
        return service


def _first_line(process: subprocess.Popen[str], within_s: float) -> str:
    """The child's first line, or nothing when it ends or stays silent."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(within_s) else ""


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
