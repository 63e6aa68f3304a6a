"""Tiny random checkpoints made by `transformers`, and the logits it computes from them.

What that library does with a `config.json` is what a model's makers tested with, so it is the
definition that our architectures are held against. Its import is slow (two seconds), so it
happens on first use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import CHAT_TEMPLATE, byte_tokenizer

VOCAB = 203
"""No power of two, and enough for the byte tokenizer's special tokens and plain ASCII."""

_COMMON: dict[str, object] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_GEMMA: dict[str, object] = {
    "head_dim": 16,
    # Small enough to matter: not head_dim, and a window that short texts leave.
    "query_pre_attn_scalar": 10,
    "sliding_window": 7,
}
_ENCODER: dict[str, object] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_TINY: dict[str, dict[str, object]] = {
    "llama": _COMMON,
    "mistral": _COMMON | {"sliding_window": 7, "head_dim": 16},
    "qwen2": _COMMON,
    "qwen3": _COMMON | {"head_dim": 16},
    "phi3": _COMMON | {"original_max_position_embeddings": 64},
    "gemma2": _COMMON | _GEMMA | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0},
    "gemma3_text": _COMMON | _GEMMA,
    "smollm3": _COMMON | {"num_hidden_layers": 5},
    "granite": _COMMON
    | {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": 0.5,
    },
    "olmo2": _COMMON,
    "mixtral": _COMMON | {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": _COMMON
    | {
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "olmoe": _COMMON | {"num_experts": 6, "num_experts_per_tok": 2},
    "bert": _ENCODER
    | {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "distilbert": _ENCODER | {"dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 4},
}


def tiny_config(model_type: str) -> dict[str, object]:
    """A `config.json` as the Hub has them, of a model of some ten thousand weights."""
    return {"model_type": model_type, **_TINY[model_type]}


def write_hf_checkpoint(
    folder: Path,
    model_type: str,
    *,
    as_given: bool = False,
    seed: int = 0,
    auto: str = "AutoModelForCausalLM",
    **changes: object,
) -> Path:
    """Make a model as `transformers` does and save it as it does, in float32, with a tokenizer.

    Args:
        folder: made if it does not exist.
        model_type: one of those that `tiny_config` knows.
        as_given: keep the `config.json` of `tiny_config` and `changes`, in the spelling and with
            the omissions it has, instead of the complete one that `transformers` saves.
        seed: of the weights.
        auto: the class of `transformers` that makes the model.
        changes: keys of `config.json` to set; None is saved as null.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(model_type) | changes
    given = json.dumps(config)
    (folder / "config.json").write_text(given)
    with _transformers() as library:
        read = library.AutoConfig.from_pretrained(folder)
        model = getattr(library, auto).from_config(read, dtype=torch.float32)
        randomise(model, seed)
        model.save_pretrained(folder)
    if as_given:
        (folder / "config.json").write_text(given)
    byte_tokenizer(int(str(config["vocab_size"]))).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def hf_config(config: dict[str, Any]) -> dict[str, Any]:
    """The complete config that `transformers` reads from one that may leave keys out."""
    with _transformers() as library:
        read: dict[str, Any] = library.AutoConfig.for_model(**config).to_dict()
    return read


def hf_rotation(
    scaling: dict[str, Any], *, theta: float, head_size: int, trained: int, length: int | None
) -> tuple[np.ndarray, float]:
    """Frequencies [head_size / 2] and magnitude that `transformers` has for a text of `length`."""
    with _transformers() as library:
        config = library.AutoConfig.for_model(
            "llama",
            hidden_size=head_size,
            num_attention_heads=1,
            max_position_embeddings=trained,
            rope_parameters={"rope_theta": theta, **scaling},
        )
        rotary = library.models.llama.modeling_llama.LlamaRotaryEmbedding
        functions = library.modeling_rope_utils.ROPE_INIT_FUNCTIONS
        name = scaling["rope_type"]
        function = functions.get(name, rotary.compute_default_rope_parameters)
        frequencies, magnitude = function(config, seq_len=length)
    return frequencies.double().numpy(), float(magnitude)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Random weights under which every part of a model matters and logits spread by about 3.

    Norms and biases are moved from where they start (1, or 0), matrices are scaled by what they
    sum over.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.add_(noise * 0.3)
            elif "embed" in name:
                weight.copy_(noise * 0.4)
            else:
                gain = 3.0 if "lm_head" in name else 1.5
                weight.copy_(noise * gain / weight.shape[-1] ** 0.5)


def load_hf_model(folder: Path, auto: str = "AutoModelForCausalLM") -> Any:
    """The model of `folder` in float32, with the attention that knows soft caps."""
    # Threads cost more than they give on matrices of this size.
    torch.set_num_threads(1)
    with _transformers() as library:
        model = getattr(library, auto).from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )
    return model.eval()


def _unchanged_hf_model(folder: Path) -> Any:
    """`load_hf_model`, once for tests in a row that only ask it for logits."""
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    return _loaded(folder, tuple(path.stat().st_mtime_ns for path in files))


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path, written_ns: tuple[int, ...]) -> Any:
    return load_hf_model(folder)


def hf_logits(folder: Path, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logits [T, V] after every token of each sequence, each alone in its batch."""
    model = _unchanged_hf_model(folder)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [model(torch.tensor([list(tokens)])).logits[0].numpy() for tokens in sequences]


def hf_greedy(folder: Path, prompt: Sequence[int], count: int) -> tuple[list[int], float]:
    """The `count` likeliest tokens after `prompt`, and the smallest lead of one over the next."""
    model, tokens, smallest = _unchanged_hf_model(folder), list(prompt), float("inf")
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(count):
            best = model(torch.tensor([tokens])).logits[0, -1].topk(2)
            smallest = min(smallest, float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :], smallest


@contextlib.contextmanager
def _transformers() -> Iterator[Any]:
    """The library, without its progress bars and its warnings (which tests take for errors)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library: Any = importlib.import_module("transformers")
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
        yield library
