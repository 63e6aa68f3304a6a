"""The README is true: every block of commands and every program runs, in order, as written."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+)\)")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def script() -> str:
    """All blocks as one bash script; `make` targets are checked, not built again."""
    parts = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT"]
    for language, body in BLOCK.findall(README):
        if language == "python":
            parts.append(f"python -P - <<'PROGRAM'\n{body}PROGRAM")
        elif not body.startswith("make "):
            parts.append(body)
    text = "\n".join(parts)
    for port in ("8080", "8081", "8090", "1883"):
        text = text.replace(f":{port}", f":{free_port()}")
    return text


@pytest.mark.system
def test_every_command_and_program_runs_in_order(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"route": "edge"' in done.stdout or '"route":"edge"' in done.stdout
    assert "[cloud: asked for the cloud" in done.stderr


def test_every_make_target_it_names_exists() -> None:
    commands = [*re.findall(r"`make ([^`]+)`", README), *re.findall(r"^make (.+)$", README, re.M)]
    targets = {word for command in commands for word in command.split()}
    assert {"demo", "test", "check"} <= targets
    for target in targets:
        make = shutil.which("make")
        assert make is not None
        command = [make, "-n", "--old-file=.venv/ready", target]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
    ],
)
def test_every_link_leads_to_a_file(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in LINK.findall(text):
        if not target.startswith(("http:", "https:")):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_a_program_that_runs_stands_within_the_first_fifteen_lines() -> None:
    assert "```sh" in README.splitlines()[:15]
