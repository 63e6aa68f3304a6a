"""OLMoE: sixty-four experts, and a norm over the whole row of queries and of keys.

Queries and keys may be cut to a magnitude behind that norm, values as they are projected
(Muennighoff et al. 2024, arXiv:2409.02060).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tidegate.model import llama_like, moe_like
from tidegate.model.architecture import Architecture
from tidegate.model.config import Config, flag, optional_float, refuse_unless
from tidegate.model.registry import Source

_DEFAULTS: Config = {
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 8,
}
"""What transformers takes for a key that is absent, where Llama's default is another."""


def describe(config: Config, context: int | None = None) -> Architecture:
    """Read an OLMoE config; see `tidegate.model.registry.describe`."""
    config = {**_DEFAULTS, **config}
    arch = llama_like.base(config, context)
    refuse_unless(config, "sliding_window", (), "null: OLMoE attends to everything")
    refuse_unless(config, "mlp_bias", (False,), "false: OLMoE has no bias there")
    size = arch.width // arch.heads
    refuse_unless(config, "head_dim", (size,), f"hidden_size / num_attention_heads = {size}")
    experts = moe_like.read_experts(
        config, inner=arch.inner, normalised=flag(config, "norm_topk_prob", False)
    )
    return replace(
        arch,
        kinds=(replace(arch.kinds[0], experts=experts),),
        qk_norm="row",
        qkv_clip=optional_float(config, "clip_qkv"),
    )


def sources(arch: Architecture, present: Collection[str]) -> Mapping[str, Source]:
    """See `tidegate.model.registry.ArchitectureModule.sources`."""
    parts = {**llama_like.NORMS_BEFORE, **llama_like.ATTENTION, **llama_like.QK_NORMS}
    return {
        **llama_like.names(arch, parts, present),
        **moe_like.expert_sources(arch, moe_like.PROJECTIONS, present),
    }
