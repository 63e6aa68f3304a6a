"""A simulated history is its number: it is shown as it was counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.system
def test_a_history_can_be_played_again_and_shown() -> None:
    command = [sys.executable, "-P", "benchmarks/link/simulation.py", "--seed", "7"]
    shown = [
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
        for _ in range(2)
    ]
    first, again = (json.loads(one.stdout) for one in shown)
    assert first == again
    assert first["counters"]["sent"] > 0
