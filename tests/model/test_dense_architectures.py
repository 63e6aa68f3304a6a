"""Dense decoders against the library that their checkpoints are made for, on random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hfcheckpoints import VOCAB, hf_greedy, hf_logits, write_hf_checkpoint

from tidegate.kernels.torch_ops import TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.resident import ResidentWeights
from tidegate.model.roles import roles
from tidegate.model.walk import decoder

TOLERANCE = 1e-4
"""On logits that spread by 3 and reach 20: float32 sums in another order."""
GAP = 1e-3
"""Lead of a greedy token over the next one, ten times the tolerance."""
LENGTHS = (30, 1, 17, 8)
"""Shorter than every window, as long as one (with the next token), and past all of them."""

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

Changes = dict[str, Any]
CASES: dict[str, tuple[str, Changes]] = {
    "llama": ("llama", {}),
    "llama-biased-tied": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "num_key_value_heads": None,
        },
    ),
    "llama-wide-heads": ("llama", {"head_dim": 20, "rope_theta": 500.0, "rms_norm_eps": 0.01}),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.5}}),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3, "hidden_act": "gelu"}),
    "mistral": ("mistral", {}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "head_dim": None}),
    "mistral-default-window": (
        "mistral",
        {"hidden_act": "gelu_new", "tie_word_embeddings": True},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2-unused-window": ("qwen2", {"sliding_window": 5, "max_window_layers": 0}),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2-yarn-tied": ("qwen2", {"rope_scaling": YARN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-biased": ("qwen3", {"attention_bias": True, "rope_theta": 1e6}),
    "qwen3-window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    ),
}


class _EveryRow(TorchOps):
    """Keeps the logits of every token of the step."""

    def gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """See `Ops.gather_rows`."""
        return x


class Model:
    """A checkpoint's own architecture and weights, on the reference operators."""

    def __init__(self, folder: Path) -> None:
        with Checkpoint.open(folder) as checkpoint:
            self.arch = checkpoint.decoder
            self.weights = ResidentWeights(checkpoint.weights())
            for name, role in roles(self.arch).items():
                (self.weights.linear if role.is_linear else self.weights.vector)(name)
        self._tensors = WeightTensors()

    def kv(self, slots: int = 1) -> TorchKv:
        """Room for `slots` texts of the whole context."""
        arch = self.arch
        return TorchKv.allocate(
            layers=arch.layers,
            slots=slots,
            tokens=arch.context,
            kv_heads=arch.kv_heads,
            head_size=arch.head_size,
        )

    def logits(self, kv: TorchKv, *rows: TorchRow) -> torch.Tensor:
        """Logits of every token of a step, [T, V]."""
        with torch.inference_mode():
            return decoder(_EveryRow(rows, kv, self._tensors), self.arch, self.weights)


def texts(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(7)
    return [tuple(rng.integers(0, VOCAB, length).tolist()) for length in lengths]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Changes]:
    return CASES[request.param]


@pytest.mark.parametrize("as_given", [True, False], ids=["hub-spelling", "saved-spelling"])
def test_texts_of_one_step_have_the_logits_that_transformers_gives_each(
    tmp_path: Path, case: tuple[str, Changes], as_given: bool
) -> None:
    model_type, changes = case
    folder = write_hf_checkpoint(tmp_path, model_type, as_given=as_given, **changes)
    model, batch = Model(folder), texts(LENGTHS)
    rows = [TorchRow(tokens=text, past=0, slot=i) for i, text in enumerate(batch)]
    found = model.logits(model.kv(len(rows)), *rows)
    expected = torch.from_numpy(np.concatenate(hf_logits(folder, batch)))
    assert expected.std() > 1
    assert (found - expected).abs().max() < TOLERANCE


def test_chunks_and_decode_steps_give_the_logits_that_transformers_gives(
    tmp_path: Path, case: tuple[str, Changes]
) -> None:
    folder = write_hf_checkpoint(tmp_path, case[0], seed=1, **case[1])
    model, (text,) = Model(folder), texts([41])
    kv, parts, past = model.kv(), [], 0
    for chunk in (3, 1, 14, 1, 1, 20, 1):
        row = TorchRow(tokens=text[past : past + chunk], past=past, slot=0)
        parts.append(model.logits(kv, row))
        past += chunk
    expected = torch.from_numpy(hf_logits(folder, [text])[0])
    assert (torch.cat(parts) - expected).abs().max() < TOLERANCE


def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, case: tuple[str, Changes]) -> None:
    folder = write_hf_checkpoint(tmp_path, case[0], seed=2, **case[1])
    model, (prompt,) = Model(folder), texts([9])
    expected, gap = hf_greedy(folder, prompt, 16)
    assert gap > GAP, f"a near tie of {gap}: take another seed"
    kv, tokens, past = model.kv(), list(prompt), 0
    while len(tokens) < len(prompt) + 16:
        row = TorchRow(tokens=tuple(tokens[past:]), past=past, slot=0)
        past = len(tokens)
        tokens.append(int(model.logits(kv, row)[-1].argmax()))
    assert tokens[len(prompt) :] == expected
