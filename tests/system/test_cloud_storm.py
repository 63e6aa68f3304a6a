"""A small storm: mixed requests, two SIGTERMs, new lives; the whole one is a benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

STORM = Path(__file__).resolve().parents[2] / "benchmarks" / "cloud" / "storm.py"


def test_every_request_of_a_small_storm_ends_once(edge_checkpoint: Path) -> None:
    pytest.importorskip("limits", reason="the library of windows is not installed")
    sizes = ("--requests", "150", "--calm", "20", "--tokens", "8")
    command = [sys.executable, "-P", str(STORM), *sizes, "--model", str(edge_checkpoint), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)["results"]
    assert all(found["checks"].values()), found
    assert sum(found["ends"].values()) == 150
    assert [life["exit_status"] for life in found["lives"]] == [0, 0, 0]
