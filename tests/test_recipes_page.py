"""docs/recipes.md is true: every block of commands runs as written, every pass is in its table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tidegate.converters.passes import known_passes
from tidegate.converters.recipe_file import preset_names

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.system
@pytest.mark.timeout(600)  # it calibrates a model twice
def test_every_command_of_the_page_runs(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    tool = tmp_path / "bin" / "tidegate"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m tidegate.cli "$@"\n')
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "set -eu\n" + "\n".join(BLOCK.findall(PAGE))],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr
    assert "recipe fast" in done.stdout
    assert "recipe balanced: gptq" in done.stdout


def test_every_pass_and_every_recipe_has_its_line() -> None:
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert named == set(known_passes()) - {"scripted"} | set(preset_names())
