"""Mistral: Llama with a sliding window over all layers (Jiang et al. 2023, arXiv:2310.06825).

Later releases set `sliding_window` to null; a config without the key has one of 4096.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tidegate.model import llama_like
from tidegate.model.architecture import Architecture
from tidegate.model.config import Config, optional_int
from tidegate.model.registry import Source

_DEFAULTS: Config = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


def describe(config: Config, context: int | None = None) -> Architecture:
    """Read a Mistral config; see `tidegate.model.registry.describe`."""
    config = {**_DEFAULTS, **config}
    arch = replace(llama_like.base(config, context), qkv_bias=False, o_bias=False, mlp_bias=False)
    return llama_like.with_windows(arch, [optional_int(config, "sliding_window")] * arch.layers)


def sources(arch: Architecture, present: Collection[str]) -> Mapping[str, Source]:
    """See `tidegate.model.registry.ArchitectureModule.sources`."""
    parts = {**llama_like.NORMS_BEFORE, **llama_like.ATTENTION, **llama_like.MLP}
    return llama_like.names(arch, parts, present)
