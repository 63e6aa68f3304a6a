"""Real brokers in their own processes, for the link's system tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from tidegate.link.broker_tls import TlsFiles
from tidegate.link.certificate_facts import read_facts
from tidegate.link.certificates import (
    CertifiedKey,
    issue_device,
    issue_gateway,
    issue_server,
    make_ca,
    make_request,
    revocation_list,
)
from tidegate.link.certificates_store import BROKER_CA, BROKER_CERTIFICATE, BROKER_KEY
from tidegate.link.keyfiles import write_atomic
from tidegate.link.mosquitto import CONFIG, MosquittoSettings, write_folder

RUNTIME = Path(__file__).resolve().parents[2] / "runtime"
_AMQTT = (
    "import asyncio, sys; sys.path.insert(0, sys.argv[1]);"
    "from tidegate.link.broker import run_broker;"
    "asyncio.run(run_broker('127.0.0.1', int(sys.argv[2])))"
)


class BrokerProcess:
    """One broker on a fixed loopback port, started and killed at will.

    Args:
        kind: `mosquitto` or `amqtt`.
        scratch: folder for its configuration and its log.
        config: a mosquitto configuration to use instead of one that takes anyone.
        port: the one that `config` listens on.
    """

    def __init__(
        self, kind: str, scratch: Path, *, config: Path | None = None, port: int | None = None
    ) -> None:
        self.port = port or free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.log = scratch / "broker.log"
        self._process: subprocess.Popen[bytes] | None = None
        if kind == "amqtt":
            pytest.importorskip("amqtt")
            self._command = [sys.executable, "-P", "-c", _AMQTT, str(RUNTIME), str(self.port)]
            return
        if config is None:
            config = scratch / "mosquitto.conf"
            config.write_text(
                f"listener {self.port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n"
            )
        self._command = [find_mosquitto(), "-c", str(config)]

    def start(self) -> None:
        assert self._process is None
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                assert self._process.poll() is None, self.log.read_text()
                time.sleep(0.05)
            else:
                return
        raise AssertionError("the broker does not listen")

    def reload(self) -> None:
        """SIGHUP: read the rules, the certificates and the list of revoked ones again.

        mosquitto listens a moment before it handles signals; until then this one would kill it.
        """
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status")
        deadline_s = time.monotonic() + 10
        while not _caught_signals(status.read_text()) & 1 << (signal.SIGHUP - 1):
            assert time.monotonic() < deadline_s, "mosquitto does not handle SIGHUP"
            time.sleep(0.01)
        self._process.send_signal(signal.SIGHUP)

    def pause(self) -> None:
        """SIGSTOP: connections stand, and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nobody is told."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)
            self._process = None


class SecureBroker:
    """mosquitto from a folder that `mosquitto.write_folder` made, and an authority of its own."""

    def __init__(self, scratch: Path, *, group: str = "home", gateways: tuple[str, ...] = ("gw0",)):
        find_mosquitto()
        scratch.mkdir(exist_ok=True)
        self.group = group
        self.folder = scratch / "broker"
        self.files = scratch / "files"
        self.data = scratch / "data"
        self.data.mkdir()
        self.ca = make_ca(group)
        self.server = issue_server(self.ca, ["localhost", "127.0.0.1"])
        self.settings = MosquittoSettings(
            group=group,
            gateways=gateways,
            installed_at=self.folder,
            data=self.data,
            port=free_port(),
            bind="127.0.0.1",
        )
        self.write()
        self.process = BrokerProcess(
            "mosquitto", scratch, config=self.folder / CONFIG, port=self.settings.port
        )
        self.url = f"mqtts://localhost:{self.settings.port}"

    def write(self, *, revoked: Iterable[bytes] = ()) -> None:
        """The folder, with certificates (PEM) that are revoked."""
        write_folder(
            self.folder,
            self.settings,
            ca_pem=self.ca.certificate_pem,
            server=self.server,
            revoked_pem=revocation_list(self.ca, [read_facts(pem).serial for pem in revoked]),
        )
        self.change_config("", "")

    def change_config(self, old: str, new: str) -> None:
        """Edit the configuration; mosquitto keeps root's rights, to read the key of the tests."""
        path = self.folder / CONFIG
        text = path.read_text().replace(old, new) if old else path.read_text()
        if os.getuid() == 0 and "user root" not in text:
            text += "user root\n"
        path.write_text(text)

    def device(self, handle: str, *, days: int = 60, now_s: float | None = None) -> TlsFiles:
        """Files of a device with this handle."""
        request, key = make_request(handle)
        certificate = issue_device(self.ca, request, handle, days, now_s=now_s)
        return self._write_files(handle, CertifiedKey(certificate_pem=certificate, key_pem=key))

    def gateway(self, gateway_id: str) -> TlsFiles:
        """Files of a gateway with this name."""
        return self._write_files(gateway_id, issue_gateway(self.ca, gateway_id))

    def stranger(self) -> TlsFiles:
        """Roots, and no certificate."""
        return replace(self._write_files("stranger", None), certificate=None, key=None)

    def _write_files(self, name: str, key: CertifiedKey | None) -> TlsFiles:
        folder = self.files / name
        write_atomic(folder / BROKER_CA, self.ca.certificate_pem)
        if key is not None:
            write_atomic(folder / BROKER_CERTIFICATE, key.certificate_pem)
            write_atomic(folder / BROKER_KEY, key.key_pem)
        return TlsFiles.in_folder(folder)


def _caught_signals(status: str) -> int:
    """The mask of signals with a handler, from /proc/PID/status."""
    line = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return int(line.split()[1], 16)


def find_mosquitto() -> str:
    mosquitto = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if mosquitto is None:
        pytest.skip("mosquitto is not installed (Debian package `mosquitto`)")
    return mosquitto


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
