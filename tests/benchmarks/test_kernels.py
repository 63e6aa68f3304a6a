"""The kernels' benchmark without a GPU: its code runs, and it does not pretend to measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import gpus
import pytest
import torch

bench: Any = import_module("kernels.run")
cases: Any = import_module("kernels.case")
timing: Any = import_module("kernels.timing")

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "benchmarks/kernels/run.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.system
def test_every_case_of_the_kernels_benchmark_runs_at_tiny_sizes() -> None:
    done = run("--smoke", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {"torch", "triton"} <= set(told["versions"])
    cases = told["results"]["cases"]
    families = {path.stem for path in (ROOT / "benchmarks" / "kernels").glob("*.py")}
    assert {one["family"] for one in cases} == families - {
        "case",
        "journal",
        "models",
        "run",
        "timing",
    }
    assert not [one for one in cases if "failed" in one]


@pytest.mark.system
@pytest.mark.skipif(gpus.DEVICE == "cuda", reason="needs a machine without a CUDA device")
def test_without_a_gpu_nothing_is_measured() -> None:
    done = run("--all", "--json")
    assert done.returncode == 2
    assert "no NVIDIA GPU here" in done.stderr
    assert done.stdout == ""


class FixedClock:
    """Every call takes as long as it is told to, in the order kernel, copy, baseline."""

    def __init__(self, *times_us: Sequence[float]) -> None:
        self._times_us = times_us

    def copy(self) -> None:
        """Nothing to copy."""

    def in_turns(
        self, calls: Sequence[Callable[[], object]]
    ) -> tuple[list[list[float]], list[bool]]:
        for call in calls:
            call()
        times = [list(one) for one in self._times_us[: len(calls)]]
        return times, [True] * len(calls)


def measured(*bars: Any, error: float = 0.5) -> Any:
    work = cases.Work(run=lambda: None, baseline=lambda: None, error=lambda: error)
    case = cases.Case(
        name="one",
        make=lambda device: work,
        bytes_moved=timing.COPY_BYTES,  # half of what a copy moves
        flops=2_000_000,
        baseline="another",
        bars=bars,
    )
    clock = FixedClock([10.0, 20.0, 40.0], [20.0, 32.0, 64.0], [30.0, 50.0, 160.0])
    return bench._timed(case, torch.device("cpu"), clock)


def test_ratios_are_taken_within_turns_and_held_to_the_bars() -> None:
    bars = [cases.Bar(kind="baseline", at_least=3.0), cases.Bar(kind="copy", at_least=0.81)]
    told = measured(*bars)
    assert told["reached"] == {"baseline": 3.0, "copy": 0.8, "tflops": 0.1}
    assert [bar["met"] for bar in told["bars"]] == [True, False]
    assert told["kernel"]["us"] == 20.0
    assert "MISSED copy >= 0.81" in bench._line({"family": "some", "case": "one"} | told)


@pytest.mark.parametrize("error", [1.5, float("nan")])
def test_a_fast_kernel_that_is_wrong_has_failed(error: float) -> None:
    told = measured(error=error)
    assert told["failed"] == "too far from float64"
    assert "FAILED" in bench._line({"family": "some", "case": "one"} | told)
