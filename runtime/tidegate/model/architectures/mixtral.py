"""Mixtral: Mistral with eight experts in place of the MLP, two for every token.

The weights of the chosen experts are scaled to sum to 1 (Jiang et al. 2024, arXiv:2401.04088).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tidegate.model import llama_like, moe_like
from tidegate.model.architecture import Architecture, LayerKind
from tidegate.model.config import Config, optional_int, refuse_unless
from tidegate.model.registry import Source

_DEFAULTS: Config = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_experts_per_tok": 2,
}
"""What transformers takes for a key that is absent, where Llama's default is another."""

_EXPERTS = moe_like.ExpertNames(
    block="block_sparse_moe", parts={"gate": "w1", "up": "w3", "down": "w2"}
)


def describe(config: Config, context: int | None = None) -> Architecture:
    """Read a Mixtral config; see `tidegate.model.registry.describe`."""
    config = {**_DEFAULTS, **config}
    for key in ("attention_bias", "mlp_bias"):
        refuse_unless(config, key, (False,), "false: Mixtral has no biases")
    arch = llama_like.base(config, context)
    kind = LayerKind(
        rope=arch.kinds[0].rope,
        window=optional_int(config, "sliding_window"),
        experts=moe_like.read_experts(config, inner=arch.inner, normalised=True),
    )
    return replace(arch, kinds=(kind,))


def sources(arch: Architecture, present: Collection[str]) -> Mapping[str, Source]:
    """See `tidegate.model.registry.ArchitectureModule.sources`."""
    parts = {**llama_like.NORMS_BEFORE, **llama_like.ATTENTION}
    return {
        **llama_like.names(arch, parts, present),
        **moe_like.expert_sources(arch, _EXPERTS, present),
    }
