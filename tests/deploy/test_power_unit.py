"""The unit of the power helper: verified by systemd itself, shut in, and true of the program."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from contextlib import closing
from pathlib import Path

import pytest

from tidegate.edge.energy import power_helper
from tidegate.edge.energy.power_kept import Kept
from tidegate.edge.energy.power_writes import KEPT

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "edge" / "deploy" / "systemd" / "tidegate-power.service"
TEXT = UNIT.read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "deploy" / "power.md").read_text(encoding="utf-8")
PROGRAM = "/opt/tidegate/bin/tidegate-power-helper"
MOST_EXPOSURE = 2.5
"""Of ten; it is root's and writes to /sys, each of which counts."""


def setting(name: str) -> str:
    (found,) = re.findall(rf"(?m)^{name}=(.*)$", TEXT)
    return str(found)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian package systemd)")
    program = tmp_path / "helper"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / UNIT.name
    unit.write_text(TEXT.replace(PROGRAM, str(program)))
    return unit


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_systemd_takes_the_unit(installed: Path) -> None:
    done = analyze("verify", "--man=no", str(installed))
    assert (done.returncode, done.stderr) == (0, "")


def test_the_helper_is_shut_in(installed: Path) -> None:
    told = analyze("security", "--offline=true", "--no-pager", str(installed)).stdout
    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", told)
    assert exposure is not None, told
    assert float(exposure.group(1)) <= MOST_EXPOSURE, told


def test_the_command_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = setting("ExecStart").split()
    assert program == PROGRAM
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts[Path(program).name] == "tidegate.edge.energy.power_helper:main"
    with pytest.raises(SystemExit):
        power_helper.main(["--help"])
    flags = re.findall(r"--[a-z]+", capsys.readouterr().out)
    assert {word for word in words if word.startswith("--")} <= set(flags)


def test_the_page_names_what_the_unit_makes() -> None:
    socket = re.search(r"--socket (\S+)", setting("ExecStart"))
    assert socket is not None
    assert socket[1] == f"/run/{setting('RuntimeDirectory')}/socket"
    assert f"--power-helper {socket[1]}" in PAGE
    assert str(UNIT.relative_to(ROOT)) in PAGE


def test_what_was_found_outlives_the_unit_and_the_page_says_where(tmp_path: Path) -> None:
    assert setting("RuntimeDirectoryPreserve") == "yes"
    folder = f"/run/{setting('RuntimeDirectory')}"
    assert f"/{KEPT}" == folder
    assert f"install -d -m 750 -g {setting('Group')} {folder}\n{PROGRAM} --socket" in PAGE
    with closing(Kept(tmp_path)) as kept:
        kept.write({("freq", 0): "1"})
    assert f"{folder}/found.json" in PAGE
    assert (tmp_path / "found.json").exists()


def test_every_request_that_is_obeyed_is_on_the_page() -> None:
    assert power_helper.__doc__ is not None
    requests = re.search(r"(?m)^    (freq .*)$", power_helper.__doc__)
    assert requests is not None
    for request in requests[1].split(" | "):
        assert f"`{request}`" in PAGE
