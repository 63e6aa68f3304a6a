"""Qwen2 and 2.5: Llama with biases on query, key, value (Yang et al. 2024, arXiv:2407.10671).

With `use_sliding_window`, the layers from `max_window_layers` on see a window.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tidegate.model import llama_like
from tidegate.model.architecture import Architecture
from tidegate.model.config import Config
from tidegate.model.registry import Source

_DEFAULTS: Config = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
}


def describe(config: Config, context: int | None = None) -> Architecture:
    """Read a Qwen2 config; see `tidegate.model.registry.describe`."""
    config = {**_DEFAULTS, **config}
    arch = replace(llama_like.base(config, context), qkv_bias=True, o_bias=False, mlp_bias=False)
    return llama_like.with_windows(arch, llama_like.upper_windows(config, arch.layers))


def sources(arch: Architecture, present: Collection[str]) -> Mapping[str, Source]:
    """See `tidegate.model.registry.ArchitectureModule.sources`."""
    parts = {**llama_like.NORMS_BEFORE, **llama_like.ATTENTION, **llama_like.MLP}
    return llama_like.names(arch, parts, present)
