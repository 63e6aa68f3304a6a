"""Checkpoints as `transformers` writes them, through ONNX Runtime, against what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hfcheckpoints import hf_greedy, hf_logits, write_hf_checkpoint

from tidegate.converters.onnx.ops import export_onnx
from tidegate.edge.executors.onnx import OnnxExecutor, OnnxSettings
from tidegate.engine.executor import ExecutorStep, Logits, Row
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.registry import known_model_types

ENCODERS = {"bert", "distilbert"}
DECODERS = [name for name in known_model_types() if name not in ENCODERS]

Changes = dict[str, Any]

CASES: dict[str, tuple[str, Changes]] = {
    **{name: (name, {}) for name in DECODERS},
    # Heads of 16 values, of which 12 are rotated, each by its own divisor and with a magnitude.
    "phi3 with longrope": (
        "phi3",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 16,
            "rope_scaling": {
                "rope_type": "longrope",
                "factor": 4.0,
                "short_factor": [1.0] * 6,
                "long_factor": [1.0, 1.1, 1.3, 1.7, 2.5, 4.0],
            },
        },
    ),
    "llama with heads of 20": ("llama", {"head_dim": 20}),
    "mixtral with a window": ("mixtral", {"sliding_window": 5}),
}

PROMPT = [int(token) for token in np.random.default_rng(0).integers(2, 200, 29)]
"""Longer than the tiny models' windows."""

CUTS = (1, 5, 6, 7, 16, 17, 29)
"""Where the prompt is cut into steps."""

TOLERANCE = 1e-4
"""On logits that spread by about 3."""


def executor_of(folder: Path, out: Path) -> OnnxExecutor:
    """The checkpoint in `folder`, lowered to `out` in float32."""
    out.mkdir()
    with Checkpoint.open(folder) as checkpoint:
        export_onnx(checkpoint.decoder, checkpoint.weights(), out)
        settings = OnnxSettings(slots=1, context_tokens=48, step_tokens=48, threads=1, exact=True)
        return OnnxExecutor(out, checkpoint.decoder, settings)


def after(executor: OnnxExecutor, tokens: list[int], past: int) -> Logits:
    """Logits [1, V] after the last of `tokens`, of which the first `past` were given before."""
    row = Row(tokens=np.array(tokens[past:]), past=past, slot=0)
    return executor.execute(ExecutorStep(rows=(row,))).logits


@pytest.mark.parametrize("case", CASES)
def test_a_converted_checkpoint_says_what_transformers_says(tmp_path: Path, case: str) -> None:
    model_type, changes = CASES[case]
    folder = write_hf_checkpoint(tmp_path / "checkpoint", model_type, **changes)
    executor = executor_of(folder, tmp_path / "onnx")
    (expected,) = hf_logits(folder, [PROMPT])
    for past, end in zip((0, *CUTS), CUTS, strict=False):
        found = after(executor, PROMPT[:end], past)
        np.testing.assert_allclose(found, expected[end - 1 : end], atol=TOLERANCE, rtol=0)
    answer, lead = hf_greedy(folder, PROMPT, 12)
    assert lead > 2 * TOLERANCE, "another seed is needed: two tokens are as likely"
    tokens = [*PROMPT, int(found.argmax())]
    while len(tokens) < len(PROMPT) + 12:
        tokens.append(int(after(executor, tokens, len(tokens) - 1).argmax()))
    assert tokens[len(PROMPT) :] == answer
