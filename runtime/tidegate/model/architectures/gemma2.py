"""Gemma 2: soft caps, norms on both sides of a block, every other layer with a window.

Gemma Team 2024, arXiv:2408.00118. Norms are kept as their difference from 1, the embedding is
scaled by the root of the width, and query times key by `query_pre_attn_scalar ** -0.5`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tidegate.model import llama_like
from tidegate.model.architecture import Architecture
from tidegate.model.config import (
    Config,
    optional_float,
    optional_int,
    positive_float,
    refuse_unless,
)
from tidegate.model.registry import Source

_DEFAULTS: Config = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
NORMS = {
    "attention_norm": "input_layernorm",
    "attention_after_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_after_norm": "post_feedforward_layernorm",
}


def describe(config: Config, context: int | None = None) -> Architecture:
    """Read a Gemma 2 config; see `tidegate.model.registry.describe`."""
    config = {**_DEFAULTS, **config}
    arch = replace(
        base(config, context), attention_softcap=optional_float(config, "attn_logit_softcapping")
    )
    turns = ["full_attention" if i % 2 else "sliding_attention" for i in range(arch.layers)]
    types = llama_like.layer_types(config, arch.layers, turns)
    window = optional_int(config, "sliding_window")
    return llama_like.with_windows(arch, llama_like.windows(types, window))


def sources(arch: Architecture, present: Collection[str]) -> Mapping[str, Source]:
    """See `tidegate.model.registry.ArchitectureModule.sources`."""
    return norms_plus_one(
        llama_like.names(arch, {**NORMS, **llama_like.ATTENTION, **llama_like.MLP}, present)
    )


def base(config: Config, context: int | None) -> Architecture:
    """What Gemma 2 and 3 have in common."""
    refuse_unless(config, "use_bidirectional_attention", (False,), "false or null")
    # Older configs have a `hidden_act` beside, which counts for nothing.
    arch = llama_like.base({**config, "hidden_act": None}, context)
    return replace(
        arch,
        activation=llama_like.activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        attention_scale=positive_float(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        head_softcap=optional_float(config, "final_logit_softcapping"),
        embed_scale=arch.width**0.5,
        norm_after=True,
        mlp_bias=False,
    )


def norms_plus_one(sources: Mapping[str, Source]) -> dict[str, Source]:
    """`sources` with 1 added to every norm."""
    return {
        role: replace(source, plus=1.0) if role.endswith("norm") else source
        for role, source in sources.items()
    }
