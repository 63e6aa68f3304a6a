"""Qwen3 with experts (Qwen3-30B-A3B, Qwen3-Coder, ...): many small ones, with a norm per head.

Some layers may keep a plain MLP, which is wider than an expert: those of `mlp_only_layers`, and
all but every `decoder_sparse_step`-th (Yang et al. 2025, arXiv:2505.09388).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tidegate.errors import CheckpointError
from tidegate.model import llama_like, moe_like
from tidegate.model.architecture import Architecture, LayerKind
from tidegate.model.config import Config, flag, optional_int, positive_int, refuse_unless
from tidegate.model.registry import Source

_DEFAULTS: Config = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "sliding_window": 4096,
}
"""What transformers takes for a key that is absent, where Llama's default is another."""


def describe(config: Config, context: int | None = None) -> Architecture:
    """Read a Qwen3-MoE config; see `tidegate.model.registry.describe`."""
    config = {**_DEFAULTS, **config}
    refuse_unless(config, "mlp_bias", (False,), "false: Qwen3-MoE has no bias there")
    arch = llama_like.base(config, context)
    # All layers or none, unlike Qwen3: `max_window_layers` is not looked at.
    windowed = flag(config, "use_sliding_window", False)
    plain = LayerKind(
        rope=arch.kinds[0].rope,
        window=optional_int(config, "sliding_window") if windowed else None,
    )
    experts = moe_like.read_experts(
        config,
        inner=positive_int(config, "moe_intermediate_size"),
        normalised=flag(config, "norm_topk_prob", False),
    )
    sparse, dense = replace(plain, experts=experts), _dense_layers(config, arch.layers)
    kinds = [plain if layer in dense else sparse for layer in range(arch.layers)]
    return llama_like.with_kinds(replace(arch, qk_norm="head"), kinds)


def _dense_layers(config: Config, layers: int) -> set[int]:
    """The layers, 0-based, that have no experts."""
    listed = config.get("mlp_only_layers")
    if listed is None:
        listed = []
    if not isinstance(listed, list) or not all(
        isinstance(layer, int) and not isinstance(layer, bool) for layer in listed
    ):
        raise CheckpointError(
            f"config.json: mlp_only_layers = {listed!r:.80}: must be a list of layer numbers"
        )
    step = positive_int(config, "decoder_sparse_step", 1)
    return {layer for layer in range(layers) if layer in listed or (layer + 1) % step}


def sources(arch: Architecture, present: Collection[str]) -> Mapping[str, Source]:
    """See `tidegate.model.registry.ArchitectureModule.sources`."""
    parts = {**llama_like.NORMS_BEFORE, **llama_like.ATTENTION, **llama_like.QK_NORMS}
    found = llama_like.names(arch, parts, present)
    found |= moe_like.expert_sources(arch, moe_like.PROJECTIONS, present)
    for layer in range(arch.layers):
        if arch.kind(layer).experts is None:
            for role, name in llama_like.MLP.items():
                full = f"model.layers.{layer}.{name}"
                found[f"layers.{layer}.{role}"] = llama_like.linear(full, present)
    return found
