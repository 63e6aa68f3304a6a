"""Real brokers in their own processes, for the link's system tests."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUNTIME = Path(__file__).resolve().parents[2] / "runtime"
_AMQTT = (
    "import asyncio, sys; sys.path.insert(0, sys.argv[1]);"
    "from tidegate.link.broker import run_broker;"
    "asyncio.run(run_broker('127.0.0.1', int(sys.argv[2])))"
)


class BrokerProcess:
    """One broker on a fixed loopback port, started and killed at will."""

    def __init__(self, kind: str, scratch: Path) -> None:
        self.port = free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        if kind == "amqtt":
            pytest.importorskip("amqtt")
            self._command = [sys.executable, "-P", "-c", _AMQTT, str(RUNTIME), str(self.port)]
            return
        mosquitto = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin")
        if mosquitto is None:
            pytest.skip("mosquitto is not installed (Debian package `mosquitto`)")
        config = scratch / "mosquitto.conf"
        config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n"
        )
        self._command = [mosquitto, "-c", str(config)]

    def start(self) -> None:
        assert self._process is None
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                assert self._process.poll() is None, "the broker did not start"
                time.sleep(0.05)
            else:
                return
        raise AssertionError("the broker does not listen")

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nobody is told."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)
            self._process = None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
