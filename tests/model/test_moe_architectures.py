"""Mixture-of-experts decoders compute what transformers computes, in either layout of experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from everylogit import reference_logits
from hfcheckpoints import (
    VOCAB,
    hf_greedy,
    hf_logits,
    load_hf_model,
    tiny_config,
    write_hf_checkpoint,
)
from safetensors.torch import load_file, save_file

from tidegate.errors import CheckpointError
from tidegate.kernels.torch_ops import TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model.architecture import Architecture
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.packed import dense_weight
from tidegate.model.registry import describe
from tidegate.model.resident import ResidentWeights
from tidegate.model.walk import Weights, decoder

TOLERANCE = 1e-4
"""On logits that spread by about 3: float32 sums in another order."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral-window": ("mixtral", {"sliding_window": 7, "head_dim": 16}),
    "mixtral-one-of-three": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe-normalised": ("qwen3_moe", {"norm_topk_prob": True, "attention_bias": True}),
    "qwen3_moe-some-dense": ("qwen3_moe", {"mlp_only_layers": [1], "tie_word_embeddings": True}),
    "qwen3_moe-every-second": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "qwen3_moe-window": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "olmoe": ("olmoe", {}),
    "olmoe-normalised": ("olmoe", {"norm_topk_prob": True, "attention_bias": True}),
    "olmoe-clipped": ("olmoe", {"clip_qkv": 0.6}),
}

SEQUENCES = [
    np.random.default_rng(length).integers(0, VOCAB, length).tolist() for length in (23, 1, 9)
]


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint, as the Hub would have it."""
    model_type, changes = VARIANTS[request.param]
    return write_hf_checkpoint(tmp_path_factory.mktemp("checkpoint"), model_type, **changes)


def step(arch: Architecture, weights: Weights, kv: TorchKv, rows: Sequence[TorchRow]) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = decoder(TorchOps(rows, kv, WeightTensors()), arch, weights).numpy()
    return logits


def make_kv(arch: Architecture, slots: int) -> TorchKv:
    return TorchKv.allocate(
        layers=arch.layers,
        slots=slots,
        tokens=arch.context,
        kv_heads=arch.kv_heads,
        head_size=arch.head_size,
    )


def test_every_logit_is_that_of_transformers(folder: Path) -> None:
    expected = hf_logits(folder, SEQUENCES)
    with Checkpoint.open(folder) as checkpoint:
        weights = ResidentWeights(checkpoint.weights())
        for tokens, logits in zip(SEQUENCES, expected, strict=True):
            found = reference_logits(checkpoint.decoder, weights, np.array(tokens))
            np.testing.assert_allclose(found, logits, atol=TOLERANCE)


def test_ragged_batches_in_chunks_end_where_transformers_does(folder: Path) -> None:
    expected = [logits[-1] for logits in hf_logits(folder, SEQUENCES)]
    with Checkpoint.open(folder) as checkpoint:
        arch, weights = checkpoint.decoder, ResidentWeights(checkpoint.weights())
        kv, past = make_kv(arch, len(SEQUENCES)), [0] * len(SEQUENCES)
        last: dict[int, np.ndarray] = {}
        # A chunk of 6 for each, then token by token, until the longest is through.
        for chunk in (6, *[1] * 17):
            waiting = [i for i, tokens in enumerate(SEQUENCES) if past[i] < len(tokens)]
            rows = [
                TorchRow(
                    tokens=tuple(SEQUENCES[i][past[i] : past[i] + chunk]), past=past[i], slot=i
                )
                for i in waiting
            ]
            for i, row, logits in zip(waiting, rows, step(arch, weights, kv, rows), strict=True):
                last[i] = logits
                past[i] += len(row.tokens)
    for i, logits in enumerate(expected):
        np.testing.assert_allclose(last[i], logits, atol=TOLERANCE)


def test_greedy_text_is_that_of_transformers(folder: Path) -> None:
    prompt, count = SEQUENCES[0], 20
    expected, lead = hf_greedy(folder, prompt, count)
    assert lead > 3 * TOLERANCE, "the weights leave a tie: take another seed"
    with Checkpoint.open(folder) as checkpoint:
        arch, weights = checkpoint.decoder, ResidentWeights(checkpoint.weights())
        kv, text, past = make_kv(arch, 1), list(prompt), 0
        for _ in range(count):
            row = TorchRow(tokens=tuple(text[past:]), past=past, slot=0)
            past = len(text)
            text.append(int(step(arch, weights, kv, [row])[0].argmax()))
    assert text[len(prompt) :] == expected


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_saved_together_are_the_same_experts(model_type: str, tmp_path: Path) -> None:
    apart, together = tmp_path / "apart", tmp_path / "together"
    changes: dict[str, Any] = {"mlp_only_layers": [0]} if model_type == "qwen3_moe" else {}
    write_hf_checkpoint(apart, model_type, **changes)
    load_hf_model(apart).save_pretrained(together, save_original_format=False)
    with Checkpoint.open(apart) as one, Checkpoint.open(together) as other:
        assert one.architecture == other.architecture
        assert any("gate_up_proj" in name for name in other.where)
        assert not any("gate_up_proj" in name for name in one.where)
        for role in one.sources:
            np.testing.assert_array_equal(numbers(one, role), numbers(other, role))


def numbers(checkpoint: Checkpoint, role: str) -> np.ndarray:
    weights = checkpoint.weights()
    return weights.vector(role) if role.endswith("norm") else dense_weight(weights.linear(role))


def test_a_stack_of_too_few_experts_is_refused(tmp_path: Path) -> None:
    apart, together = tmp_path / "apart", tmp_path / "together"
    model = load_hf_model(write_hf_checkpoint(apart, "olmoe"))
    model.save_pretrained(together, save_original_format=False)
    file, name = together / "model.safetensors", "model.layers.2.mlp.experts.gate_up_proj"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name][:5].contiguous()}, file)
    with pytest.raises(CheckpointError, match=r"layers\.2.*shape \(5, 160, 48\).*\(6, 160, 48\)"):
        Checkpoint.open(together)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mixtral", {"attention_bias": True}, "attention_bias = True: must be false"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9: must be at most"),
        ("mixtral", {"num_experts": 4}, "num_experts = .*: must be one number"),
        ("mixtral", {"num_hidden_layers": 4096, "num_local_experts": 4096}, "131072 together"),
        ("mixtral", {"num_local_experts": None}, "num_experts = .*: must be one number"),
        ("mixtral", {"sliding_window": 0}, "sliding_window = 0: must be a whole number"),
        ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers = '0': must be a list"),
        ("qwen3_moe", {"mlp_only_layers": [True]}, "mlp_only_layers = .*: must be a list"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0: must be"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob = 1: must be true or false"),
        ("olmoe", {"clip_qkv": -1.0}, "clip_qkv = -1.0: must be a number above 0"),
        ("olmoe", {"sliding_window": 128}, "sliding_window = 128: must be null"),
        ("olmoe", {"head_dim": 16}, "head_dim = 16: must be hidden_size"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    model_type: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        describe(tiny_config(model_type) | changes)


def test_a_window_counts_only_where_the_config_switches_it_on() -> None:
    config = tiny_config("qwen3_moe") | {"sliding_window": 5}
    for on, window in ((False, None), (True, 5)):
        arch = describe(config | {"use_sliding_window": on})
        assert isinstance(arch, Architecture)
        assert {arch.kind(layer).window for layer in range(arch.layers)} == {window}
