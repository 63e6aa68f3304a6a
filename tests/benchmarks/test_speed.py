"""The speed benchmark on a tiny model, with no peer built: it says so and measures ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.system
def test_a_quick_run_measures_ours_and_names_the_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "benchmarks/edge/speed.py", "--quick", "--json"]
    done = subprocess.run(
        [*command, "--work", str(tmp_path / "work")],
        cwd=ROOT,
        env=os.environ | {"TIDEGATE_PEERS": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert {"llama.cpp", "OpenVINO GenAI", "onnxruntime-genai g32"} <= set(results["missing"])
    ours = {one["engine"]: one for one in results["engines"]}
    assert {"tidegate openvino", "tidegate onnx"} <= set(ours)
    for one in ours.values():
        assert one["prefill_tokens_per_s"] > 0
        assert one["decode_tokens_per_s"].keys() == {"1", "2"}
        assert one["rss_mib"] > 0
    assert results["read_gb_per_s"] > 0
    assert all(one["verdict"] for one in results["bars"])
