"""Checkpoints as `transformers` writes them, through OpenVINO, against what it computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hfcheckpoints import hf_greedy, hf_logits, write_hf_checkpoint

from tidegate.converters.openvino.ops import export_openvino
from tidegate.edge.executors.openvino import OpenVinoExecutor, OpenVinoSettings
from tidegate.engine.executor import ExecutorStep, Logits, Row
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.registry import known_model_types

ENCODERS = {"bert", "distilbert"}
DECODERS = [name for name in known_model_types() if name not in ENCODERS]

PROMPT = [int(token) for token in np.random.default_rng(0).integers(2, 200, 37)]
"""Longer than the tiny models' windows, and than a block."""

CUTS = (1, 5, 6, 7, 16, 17, 37)
"""Where the prompt is cut into steps."""

SETTINGS = OpenVinoSettings(
    kv_tokens=64, context_tokens=56, step_tokens=48, step_rows=1, threads=1, exact=True
)
TOLERANCE = 1e-4
"""On logits that spread by about 3."""


def executor_of(folder: Path, out: Path) -> OpenVinoExecutor:
    """The checkpoint in `folder`, lowered to `out` in float32."""
    with Checkpoint.open(folder) as checkpoint:
        export_openvino(checkpoint.decoder, checkpoint.weights(), out)
        return OpenVinoExecutor(out, checkpoint.decoder, SETTINGS)


def after(executor: OpenVinoExecutor, tokens: list[int], past: int) -> Logits:
    """Logits [1, V] after the last of `tokens`, of which the first `past` were given before."""
    blocks = np.array([1, 0], np.int32)
    row = Row(tokens=np.array(tokens[past:]), past=past, blocks=blocks)
    return executor.execute(ExecutorStep(rows=(row,))).logits


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_converted_checkpoint_says_what_transformers_says(
    tmp_path: Path, model_type: str
) -> None:
    folder = write_hf_checkpoint(tmp_path / "checkpoint", model_type)
    executor = executor_of(folder, tmp_path / "openvino")
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
