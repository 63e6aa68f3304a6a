"""The kernels' benchmark without a GPU: its code runs, and it does not pretend to measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpus
import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "benchmarks/kernels/run.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.system
def test_every_case_of_the_kernels_benchmark_runs_at_tiny_sizes() -> None:
    done = run("--quick", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {"torch", "triton"} <= set(told["versions"])
    cases = told["results"]["cases"]
    families = {path.stem for path in (ROOT / "benchmarks" / "kernels").glob("*.py")}
    assert {one["family"] for one in cases} == families - {"case", "run", "timing"}
    assert not [one for one in cases if "failed" in one]


@pytest.mark.system
@pytest.mark.skipif(gpus.DEVICE == "cuda", reason="needs a machine without a CUDA device")
def test_without_a_gpu_nothing_is_measured() -> None:
    done = run("--all", "--json")
    assert done.returncode == 2
    assert "no NVIDIA GPU here" in done.stderr
    assert done.stdout == ""
