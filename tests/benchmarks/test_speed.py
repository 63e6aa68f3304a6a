"""The edge benchmarks on a tiny model, with no peer built: they say so and measure ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model is converted, once for all."""
    return tmp_path_factory.mktemp("bench")


def quick(script: str, work: Path) -> Any:
    """The results of a smoke run."""
    command = [sys.executable, "-P", f"benchmarks/edge/{script}.py", "--quick", "--json"]
    done = subprocess.run(
        [*command, "--work", str(work / "work")],
        cwd=ROOT,
        env=os.environ | {"TIDEGATE_PEERS": str(work)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["results"]


@pytest.mark.system
def test_speed_measures_ours_and_names_the_missing(work: Path) -> None:
    results = quick("speed", work)
    assert {"llama.cpp", "OpenVINO GenAI", "onnxruntime-genai g32"} <= set(results["missing"])
    ours = {one["engine"]: one for one in results["engines"]}
    assert {"tidegate openvino", "tidegate onnx"} <= set(ours)
    for one in ours.values():
        assert one["prefill_tokens_per_s"] > 0
        assert one["decode_tokens_per_s"].keys() == {"1", "2"}
        assert one["rss_mib"] > 0
    assert results["read_gb_per_s"] > 0
    assert all(one["verdict"] for one in results["bars"])


@pytest.mark.system
def test_a_cached_prefix_is_quicker_than_a_cold_one(work: Path) -> None:
    results = quick("prefix", work)
    ours = {one["engine"]: one for one in results["engines"]}
    for name in ("tidegate openvino", "tidegate onnx"):
        assert 0 < ours[name]["warm_s"] < ours[name]["cold_s"]
    for one in results["daemon"].values():
        assert all(one[name] > 0 for name in ("cold_s", "ram_s", "disk_s"))


@pytest.mark.system
def test_the_service_is_compared_with_the_bare_executor(work: Path) -> None:
    (only,) = quick("service", work)["rounds"]
    assert 0 < only["executor_step_s"] < 1
    assert 0 < only["engine_step_s"] < 1
    assert 0 < only["daemon"]["step_s"] < 1
    assert only["daemon"]["cold_start_s"] > 0


@pytest.mark.system
def test_every_request_of_a_short_soak_ends_once_and_as_it_would_alone(work: Path) -> None:
    results = quick("soak", work)
    assert sum(results["ended"].values()) == 60
    assert results["compared"] > 0
    assert (results["wrong"], results["different"]) == ([], [])
    assert results["engine"]["running"] == results["engine"]["waiting"] == 0


@pytest.mark.system
def test_guessing_ahead_is_compared_with_the_same_answers_without(work: Path) -> None:
    passes = quick("speculation", work)["passes"]
    assert {"JSON action", "JSON schedule, schema", "quotes"} <= set(passes)
    assert sum(one["guessed"] for (one,) in passes.values()) > 0
    assert [one["different"] for (one,) in passes.values()] == [0] * len(passes)


@pytest.mark.system
def test_constrained_answers_are_valid_and_as_long_as_free_ones(work: Path) -> None:
    results = quick("constrained", work)
    assert results["wrong"] == []
    assert {(one["model"], one["streams"]) for one in results["costs"]} == {
        ("assistant", 1),
        ("assistant", 8),
    }
