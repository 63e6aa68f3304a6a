"""docs/profiles.md is true: its commands run as written, every board is in its table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tidegate.edge.energy.profile_files import read_library

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.system
def test_every_command_of_the_page_runs(tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "tidegate"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m tidegate.cli "$@"\n')
    tool.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", "set -eu\n" + "\n".join(BLOCK.findall(PAGE))],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "jetson-agx-thor" in done.stdout
    assert "energy.idle[0].w = 3.1" in done.stdout
    assert 'energy.idle[0].src.* = "meter"' in done.stdout


def test_every_board_has_its_line_with_the_runs_that_are_measured(tmp_path: Path) -> None:
    rows = {line.split("|")[1]: line for line in PAGE.splitlines() if line.startswith("| `")}
    library = read_library(tmp_path, tmp_path / "none")
    assert sorted(re.findall(r"`([^`]+)`", " ".join(rows))) == list(library.ids())
    words = {"one": 1, "two": 2, "three": 3, "four": 4}
    for names, row in rows.items():
        said = re.search(r"in (\w+) runs?", row)
        count = 0 if said is None else words.get(said[1]) or int(said[1])
        for name in re.findall(r"`([^`]+)`", names):
            points = library.profile(name).energy.point
            assert sum(one.active_w is not None for one in points) == count, name
