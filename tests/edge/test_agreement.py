"""One set of packed integers, three executions: the benchmark's figures, held to their bars."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEAR_TIE = 0.25
"""Top-two gap, in logits, within which int8 activations may choose the other token."""


@pytest.mark.system
def test_onnx_and_openvino_choose_what_torch_chooses_on_the_same_integers() -> None:
    command = [sys.executable, "-P", "benchmarks/edge/agreement.py", "--prompts", "50", "--json"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert {(one["execution"], one["activations"]) for one in results} == {
        (execution, kind) for execution in ("onnx", "openvino") for kind in ("fp32", "int8")
    }
    for one in results:
        assert one["positions"] > 2000
        bar = 0.999 if one["activations"] == "fp32" else 0.98
        assert one["agreement"] >= bar, one
        assert one["answer_agreement"] >= bar, one
        assert one["widest_gap"] < (1e-3 if one["activations"] == "fp32" else NEAR_TIE), one
