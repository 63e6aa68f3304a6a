"""Debian's redis-server for tests: a port and folder of its own, ended by its process."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class RedisServer:
    """One server; `stop` and `start` keep its port, and with it its clients' address."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of its first database."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it and wait until it answers."""
        program = shutil.which("redis-server")
        assert program is not None
        settings = ("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder))
        durable = ("--save", "", "--appendonly", "yes", "--appendfsync", "always")
        self.process = subprocess.Popen(
            [program, *settings, *durable], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline_s = time.monotonic() + 20
        while not self._answers():
            assert time.monotonic() < deadline_s, "redis-server does not answer"
            time.sleep(0.02)

    def stop(self) -> None:
        """Kill it: what it wrote is what it knows when it starts again."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)
            self.process = None

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe:
                probe.sendall(b"PING\r\n")
                return probe.recv(16).startswith(b"+PONG")
        except OSError:
            return False


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    """A server while the block runs. Skips the test where it or its client is not installed."""
    pytest.importorskip("redis")
    pytest.importorskip("limits")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (Debian package redis-server)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    server = RedisServer(folder, port)
    server.start()
    try:
        yield server
    finally:
        server.stop()
