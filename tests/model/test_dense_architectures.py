"""Dense decoders against the library that their checkpoints are made for, on random weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hfcheckpoints import VOCAB, hf_config, hf_greedy, hf_logits, tiny_config, write_hf_checkpoint

from tidegate.errors import CheckpointError
from tidegate.kernels.torch_ops import TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.registry import describe
from tidegate.model.resident import ResidentWeights
from tidegate.model.roles import roles
from tidegate.model.rope import Rope
from tidegate.model.walk import decoder

TOLERANCE = 1e-4
"""On logits that spread by 3 and reach 20: float32 sums in another order."""
SEED, GAP = 3, 1e-2
"""Of the weights, and the lead that every greedy token then has over the next one."""
LENGTHS = (30, 1, 17, 8)
"""Shorter than every window, as long as one (with the next token), and past all of them."""

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DIVISORS = {
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
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
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 9, "num_key_value_heads": None}),
    "phi3-partial-tied": ("phi3", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "phi3-longrope": (
        "phi3",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"rope_type": "longrope", "factor": 3.0, **DIVISORS},
        },
    ),
    "gemma2": ("gemma2", {}),
    "gemma2-no-caps": (
        "gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "hidden_activation": "gelu",
            "hidden_act": "relu",
            "tie_word_embeddings": False,
        },
    ),
    "gemma2-layer-types": (
        "gemma2",
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "gemma3": ("gemma3_text", {}),
    "gemma3-old-spelling": (
        "gemma3_text",
        {
            "sliding_window_pattern": 2,
            "rope_theta": 50000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "attention_bias": True,
        },
    ),
    "gemma3-new-spelling": (
        "gemma3_text",
        {
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "final_logit_softcapping": 5.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5},
            },
        },
    ),
    "smollm3": ("smollm3", {}),
    "smollm3-pattern": (
        "smollm3",
        {
            "no_rope_layers": [0, 1, 1, 0, 1],
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "smollm3-window": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
    ),
    "granite": ("granite", {}),
    "granite-plain": (
        "granite",
        {
            "attention_multiplier": 0.25,
            "embedding_multiplier": 1,
            "residual_multiplier": 1.0,
            "logits_scaling": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2-biased": ("olmo2", {"attention_bias": True, "num_key_value_heads": None}),
    "olmo2-yarn": ("olmo2", {"rope_scaling": {**YARN, "attention_factor": 1.2}}),
}


class _EveryRow(TorchOps):
    """Keeps the logits of every token of the step."""

    def gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """See `Ops.gather_rows`."""
        return x


class Model:
    """A checkpoint's own architecture and weights, on the reference operators."""

    def __init__(self, folder: Path, context: int | None = None) -> None:
        with Checkpoint.open(folder, context=context) as checkpoint:
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


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each case, with its config as the Hub would have it."""
    model_type, changes = CASES[request.param]
    made = tmp_path_factory.mktemp(request.param)
    return write_hf_checkpoint(made, model_type, as_given=True, seed=SEED, **changes)


def test_texts_of_one_step_have_the_logits_that_transformers_gives_each(folder: Path) -> None:
    model, batch = Model(folder), texts(LENGTHS)
    rows = [TorchRow(tokens=text, past=0, slot=i) for i, text in enumerate(batch)]
    found = model.logits(model.kv(len(rows)), *rows)
    expected = torch.from_numpy(np.concatenate(hf_logits(folder, batch)))
    assert expected.std() > 1
    assert (found - expected).abs().max() < TOLERANCE


def test_chunks_and_decode_steps_give_the_logits_that_transformers_gives(folder: Path) -> None:
    model, (text,) = Model(folder), texts([41])
    kv, parts, past = model.kv(), [], 0
    for chunk in (3, 1, 14, 1, 1, 20, 1):
        row = TorchRow(tokens=text[past : past + chunk], past=past, slot=0)
        parts.append(model.logits(kv, row))
        past += chunk
    expected = torch.from_numpy(hf_logits(folder, [text])[0])
    assert (torch.cat(parts) - expected).abs().max() < TOLERANCE


def test_greedy_tokens_are_those_of_transformers(folder: Path) -> None:
    model, (prompt,) = Model(folder), texts([9])
    expected, gap = hf_greedy(folder, prompt, 16)
    assert gap > GAP, f"a near tie of {gap}: take another seed"
    kv, tokens, past = model.kv(), list(prompt), 0
    while len(tokens) < len(prompt) + 16:
        row = TorchRow(tokens=tuple(tokens[past:]), past=past, slot=0)
        past = len(tokens)
        tokens.append(int(model.logits(kv, row)[-1].argmax()))
    assert tokens[len(prompt) :] == expected


@pytest.mark.parametrize("case", CASES)
def test_a_config_reads_the_same_in_the_hubs_spelling_and_in_that_of_transformers(
    case: str,
) -> None:
    model_type, changes = CASES[case]
    config = tiny_config(model_type) | changes
    assert describe(config) == describe(hf_config(config))


@pytest.mark.parametrize(
    ("model_type", "changes", "context"),
    [
        (
            "llama",
            {"max_position_embeddings": 32, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            41,
        ),
        (
            "phi3",
            {
                "num_attention_heads": 4,
                "original_max_position_embeddings": 16,
                "rope_scaling": {"rope_type": "longrope", **DIVISORS},
            },
            64,
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_a_rotation_that_depends_on_length_is_that_of_the_longest_text(
    tmp_path: Path, model_type: str, changes: Changes, context: int
) -> None:
    """Transformers takes it from the length of the text, so the text is made as long."""
    folder = write_hf_checkpoint(tmp_path, model_type, as_given=True, **changes)
    model, (text,) = Model(folder, context), texts([41])
    kv = model.kv()
    parts = [
        model.logits(kv, TorchRow(tokens=text[start : start + 20], past=start, slot=0))
        for start in (0, 20, 40)
    ]
    expected = torch.from_numpy(hf_logits(folder, [text])[0])
    assert (torch.cat(parts) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("model_type", sorted({model_type for model_type, _ in CASES.values()}))
def test_a_key_that_is_left_out_is_what_transformers_takes_it_for(model_type: str) -> None:
    sizes = {
        "vocab_size": 40000,
        "hidden_size": 256,
        "intermediate_size": 100,
        "num_hidden_layers": 13,
        "num_attention_heads": 32,
    }
    config = {"model_type": model_type, **sizes}
    assert describe(config) == describe(hf_config(config))


SLIDING = ["sliding_attention"] * 3


@pytest.mark.parametrize(
    ("model_type", "changes", "problem"),
    [
        ("llama", {"hidden_act": "mish"}, "hidden_act = 'mish': must be one of silu"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: must be 1"),
        ("llama", {"rope_scaling": {"rope_type": "su"}}, "rope_type = 'su': must be one of"),
        ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000: must be"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide"),
        ("llama", {"head_dim": 7}, "must rotate an even number of the 7 values of a head"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0: must be a whole number"),
        ("qwen2", {"layer_types": SLIDING}, "sliding_window is null or not in use"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "must be 3 of ('full_attention'"),
        ("qwen3", {"layer_types": SLIDING[:2]}, "must be 3 of ('full_attention'"),
        ("phi3", {"rope_scaling": {"type": "linear"}}, "rope_type = 'linear': must be one of"),
        ("gemma2", {"hidden_activation": "mish"}, "hidden_activation = 'mish': must be one"),
        ("gemma2", {"sliding_window": None}, "sliding_window is null or not in use"),
        ("gemma2", {"use_bidirectional_attention": True}, "must be false or null"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0: must be a number"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "must be null for this model_type"),
        ("gemma3_text", {"rope_parameters": {"factor": 2.0}}, "must have an entry for each of"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "must be a 0 or 1 for 5 layers"),
        ("smollm3", {"no_rope_layers": [2] * 5}, "must be a 0 or 1 for 5 layers"),
        ("smollm3", {"sliding_window": 4, "layer_types": ["sliding_attention"] * 5}, "not in use"),
        ("granite", {"logits_scaling": -8.0}, "logits_scaling = -8.0: must be a number above 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_key(
    model_type: str, changes: Changes, problem: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(problem)):
        describe(tiny_config(model_type) | changes)


NEUTRAL: Changes = {
    "attention_softcap": None,
    "head_softcap": None,
    "embed_scale": 1.0,
    "residual_scale": 1.0,
    "head_scale": 1.0,
    "qk_norm": "none",
    "activation": "relu",
    "attention_scale": 0.1,
    "norm_eps": 1.0,
    "pattern": (),
}


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "smollm3", "granite", "olmo2"])
def test_every_feature_of_a_model_shows_in_its_logits(tmp_path: Path, model_type: str) -> None:
    """So that the comparisons above would fail without it."""
    folder = write_hf_checkpoint(tmp_path, model_type, num_hidden_layers=6)
    model, (text,) = Model(folder), texts([30])
    row = TorchRow(tokens=text, past=0, slot=0)
    expected = model.logits(model.kv(), row)
    whole = model.arch
    changed = {name: v for name, v in NEUTRAL.items() if getattr(whole, name) != v}
    for name, value in changed.items():
        model.arch = replace(whole, **{name: value})
        assert (model.logits(model.kv(), row) - expected).abs().max() > 100 * TOLERANCE, name
    for kind in whole.kinds:
        for other in (replace(kind, window=3), replace(kind, rope=Rope.plain(50.0, 4))):
            model.arch = replace(whole, kinds=tuple(other if k == kind else k for k in whole.kinds))
            assert (model.logits(model.kv(), row) - expected).abs().max() > 100 * TOLERANCE, kind
