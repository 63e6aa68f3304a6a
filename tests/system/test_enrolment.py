"""A fleet by the real commands: init, token, enroll, a call over TLS, revoke, two refusals."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from services import Service, Services, free_port, run_tidegate, until
from streams import chat

pytestmark = pytest.mark.system


def _tidegate(*arguments: object) -> str:
    """The stdout of a command that succeeds."""
    done = run_tidegate(*(str(one) for one in arguments))
    assert done.returncode == 0, done.stderr
    return done.stdout


def _broker_folder(*arguments: object) -> Path:
    """Write mosquitto's folder; started by root, it keeps root's rights to read the tests' keys."""
    _tidegate(*arguments)
    config = Path(str(arguments[2])) / "mosquitto.conf"
    if os.getuid() == 0:
        config.write_text(config.read_text() + "user root\n")
    return config


def _ask(device: Service) -> Any:
    body = chat("which gate opens", max_tokens=8, tidegate={"route": "cloud"})
    return httpx.post(f"{device.url}/v1/chat/completions", json=body, timeout=60).json()


def _reachable(device: Service) -> bool:
    return bool(device.get("/status")["link"]["reachable"])


def test_a_device_enrols_asks_and_is_refused_by_name_once_it_is_revoked(
    bundle: Path, cloud_checkpoint: Path, tmp_path: Path
) -> None:
    gateway, device, port = tmp_path / "gateway", tmp_path / "device", free_port()
    _tidegate("keys", "init", tmp_path / "fleet", gateway)
    folder = ("broker", "config", tmp_path / "broker", "--fleet", tmp_path / "fleet")
    where = ("--gateway", "gw0", "--host", "127.0.0.1", "--bind", "127.0.0.1", "--port", port)
    config = _broker_folder(*folder, *where)
    with Services(tmp_path) as services:
        door = services.tidegate("door", "keys", "serve", str(gateway), "--listen", "127.0.0.1:0")
        token = _tidegate("keys", "token", gateway, "--url", door.url).strip()
        _tidegate("enroll", token, "--keys", device)
        again = run_tidegate("enroll", token, "--keys", str(tmp_path / "other"))
        assert again.returncode == 1
        assert "token: was used already" in again.stderr
        assert door.stop() == 0

        broker = services.mosquitto(port, config=config)
        link = ("--link", broker.url, "--keys")
        services.cloud(cloud_checkpoint, *link, str(gateway))
        edge = services.serve(bundle, *link, str(device))
        until(lambda: _reachable(edge), "the route to the cloud opens")
        assert _ask(edge)["tidegate"]["route"] == "cloud"

        (line,) = _tidegate("keys", "devices", gateway).splitlines()
        handle = line.split()[0]
        assert handle in _tidegate("keys", "show", device)
        _tidegate("keys", "revoke", gateway, handle)
        refusal = _ask(edge)["error"]
        assert refusal["code"] == "device_refused"
        assert refusal["message"] == "the gateway refuses this device: it was revoked"
        (line,) = _tidegate("keys", "devices", gateway).splitlines()
        assert line.split()[1] == "revoked"

        _broker_folder(*folder, *where, "--revoked", gateway / "revoked.pem")
        broker.process.send_signal(signal.SIGHUP)
        assert edge.stop() == 0
        barred = services.serve(bundle, *link, str(device))
        until(lambda: "certificate revoked" in barred.log.read_text(), "the broker refuses it")
        for service in (edge, barred, door):
            assert token not in service.log.read_text()
