"""A page's commands, run as a newcomer would: in order, in an empty folder, on ports of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from linkbrokers import find_mosquitto, free_port

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands_of(page: str) -> str:
    """Everything in its `sh` blocks."""
    return "\n".join(_BLOCK.findall((ROOT / page).read_text(encoding="utf-8")))


def run_page(
    page: str, folder: Path, *, ports: tuple[int, ...], within_s: float
) -> subprocess.CompletedProcess[str]:
    """Run a page's commands; what they started ends with them.

    Args:
        page: its path in the repository.
        folder: empty; where they run.
        ports: those that the page names; each becomes a free one.
        within_s: for all of it.
    """
    tools = folder / "bin"
    tools.mkdir()
    for name, script in _tools().items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    (folder / "examples").symlink_to(ROOT / "examples")
    commands = commands_of(page)
    chosen = {port: free_port() for port in ports}
    for port, free in chosen.items():
        assert f":{port}" in commands, f"{page} names no port {port}"
        commands = commands.replace(f":{port}", f":{free}")
    if 8883 in chosen:
        config = "tidegate broker config broker/"
        commands = commands.replace(config, f"{config} --port {chosen[8883]}")
    ends = "trap 'kill $(jobs -p) 2> jobs.log || true; wait' EXIT"
    return subprocess.run(
        ["bash", "-c", f"set -eu\n{ends}\n{commands}"],
        cwd=folder,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )


def logs(folder: Path) -> str:
    """The ends of all logs, for a test that fails."""
    return "".join(
        f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}\n"
        for path in sorted(folder.glob("*.log"))
    )


def _tools() -> Mapping[str, str]:
    return {
        "tidegate": f'exec {sys.executable} -P -m tidegate.cli "$@"',
        # Root may not give up its rights here: mosquitto's user cannot reach this folder.
        "mosquitto": f'[ "$(id -u)" = 0 ] && echo user root >> "$2"; exec {find_mosquitto()} "$@"',
    }
