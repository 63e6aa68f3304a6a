"""Llama and everything saved as `model_type: llama` (Llama 2/3, TinyLlama, SmolLM, ...).

Pre-norm decoder with grouped-query attention, rotary positions and a SiLU-gated MLP
(Touvron et al. 2023, arXiv:2307.09288). RoPE scaling is refused by name, not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping

from tidegate.errors import CheckpointError
from tidegate.model.architecture import Architecture, Rope
from tidegate.model.config import flag, positive_float, positive_int, refuse_unless


def describe(config: Mapping[str, object]) -> Architecture:
    """Read a Llama config; see `tidegate.model.architecture.describe`."""
    refuse_unless(config, "hidden_act", ("silu",), "silu")
    width, heads = positive_int(config, "hidden_size"), positive_int(config, "num_attention_heads")
    kv_heads = positive_int(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_key_value_heads = {kv_heads}: "
            f"must divide num_attention_heads = {heads}"
        )
    return Architecture(
        model_type="llama",
        layers=positive_int(config, "num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=positive_int(config, "head_dim", width // heads),
        inner=positive_int(config, "intermediate_size"),
        vocab=positive_int(config, "vocab_size"),
        context=positive_int(config, "max_position_embeddings", 2048),
        norm_eps=positive_float(config, "rms_norm_eps", 1e-6),
        activation="silu",
        rope=_rope(config),
        tied_head=flag(config, "tie_word_embeddings", False),
        attention_bias=flag(config, "attention_bias", False),
        mlp_bias=flag(config, "mlp_bias", False),
    )


def _rope(config: Mapping[str, object]) -> Rope:
    """RoPE from either spelling: flat `rope_theta`, or `rope_parameters` (transformers >= 5)."""
    refuse_unless(config, "rope_scaling", (), "absent (RoPE scaling is not supported yet)")
    parameters = config.get("rope_parameters")
    if parameters is None:
        return Rope(theta=positive_float(config, "rope_theta", 10000.0))
    if not isinstance(parameters, dict):
        raise CheckpointError(f"config.json: rope_parameters = {parameters!r}: must be an object")
    refuse_unless(parameters, "rope_type", ("default",), "default (no scaling is supported yet)")
    return Rope(theta=positive_float(parameters, "rope_theta", 10000.0))


def tensor_names(arch: Architecture) -> Mapping[str, str]:
    """Checkpoint names by role; see `ArchitectureModule.tensor_names`."""
    names = {"embed": "model.embed_tokens", "final_norm": "model.norm"}
    if not arch.tied_head:
        names["head"] = "lm_head"
    parts = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        **{role: f"self_attn.{role}_proj" for role in "qkvo"},
        **{role: f"mlp.{role}_proj" for role in ("gate", "up", "down")},
    }
    for i in range(arch.layers):
        names |= {f"layers.{i}.{role}": f"model.layers.{i}.{name}" for role, name in parts.items()}
    return names
