"""The systemd units: verified by systemd itself, and true of the program."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from manifests import DEPLOY, parsed

from tidegate.api.lifecycle import STUCK_STATUS

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
NAMED = {"tidegate-gateway@.service": "tidegate-gateway@gw0.service"}
VALUES = {
    "$MODEL": "model",
    "${LISTEN}": "127.0.0.1:0",
    "${BROKER}": "mqtts://broker:8883",
    " $MORE": "",
    "%i": "gw0",
}
MOST_EXPOSURE = 2.0
"""Of ten, as `systemd-analyze security` counts; what a service has without any setting is 9.6."""


def settings(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture
def installed(tmp_path: Path) -> list[Path]:
    """Copies that name a program and files that there are."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian package systemd)")
    program = tmp_path / "tidegate"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    made = []
    for path in UNITS:
        text = path.read_text("utf-8").replace("/opt/tidegate/bin/tidegate", str(program))
        made.append(tmp_path / NAMED.get(path.name, path.name))
        made[-1].write_text(re.sub(r"(?m)^EnvironmentFile=.*$", "EnvironmentFile=/dev/null", text))
    return made


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_systemd_takes_every_unit(installed: list[Path]) -> None:
    done = analyze("verify", "--man=no", *map(str, installed))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_systemd_would_say_what_is_wrong(installed: list[Path]) -> None:
    broken = installed[0]
    broken.write_text(broken.read_text("utf-8").replace("Type=exec", "Type=exec\nRestarts=always"))
    assert "Restarts" in analyze("verify", "--man=no", str(broken)).stderr


def test_services_are_shut_in(installed: list[Path]) -> None:
    for path in installed:
        told = analyze("security", "--offline=true", "--no-pager", str(path)).stdout
        exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", told)
        assert exposure is not None, told
        assert float(exposure.group(1)) <= MOST_EXPOSURE, told


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_the_command_is_ours_and_has_the_time_to_drain(path: Path) -> None:
    found = settings(path)
    (command,) = found["ExecStart"]
    for name, value in VALUES.items():
        command = command.replace(name, value)
    program, *arguments = command.split()
    assert program == "/opt/tidegate/bin/tidegate"
    read = parsed(arguments)
    assert int(found["TimeoutStopSec"][0]) >= 2 * getattr(read, "drain", 30) + 5
    state = found["StateDirectory"][0].replace("%i", "gw0").split()
    for folder in (getattr(read, "state", None), read.keys):
        if folder is not None:
            assert str(folder.relative_to("/var/lib")) in state


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_service_that_is_stuck_is_started_again(path: Path) -> None:
    found = settings(path)
    assert found["Restart"] == ["on-failure"]
    assert found["RestartForceExitStatus"] == [str(STUCK_STATUS)]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_who_may_run_over_several_gpus_may_ask_for_the_interfaces(path: Path) -> None:
    found = settings(path)
    families = set(found["RestrictAddressFamilies"][0].split())
    # What gloo and NCCL call, getifaddrs, opens a netlink socket.
    on_gpus = " cloud " in found["ExecStart"][0]
    assert families == {"AF_INET", "AF_INET6", "AF_UNIX"} | ({"AF_NETLINK"} if on_gpus else set())


def test_the_user_of_the_services_is_made() -> None:
    made = (DEPLOY / "systemd" / "tidegate.sysusers.conf").read_text("utf-8")
    users = {settings(path)["User"][0] for path in UNITS}
    assert users == {"tidegate"}
    assert re.search(r"^u tidegate ", made, re.MULTILINE)
