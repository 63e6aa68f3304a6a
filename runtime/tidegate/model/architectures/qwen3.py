"""Qwen3: Llama with an RMS norm of every query and key head (Yang et al. 2025, arXiv:2505.09388).

Heads are 128 values wide unless the config says otherwise, whatever the width of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tidegate.model import llama_like
from tidegate.model.architecture import Architecture
from tidegate.model.config import Config
from tidegate.model.registry import Source

_DEFAULTS: Config = {
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
}


def describe(config: Config, context: int | None = None) -> Architecture:
    """Read a Qwen3 config; see `tidegate.model.registry.describe`."""
    config = {**_DEFAULTS, **config}
    arch = replace(llama_like.base(config, context), qk_norm="head", mlp_bias=False)
    return llama_like.with_windows(arch, llama_like.upper_windows(config, arch.layers))


def sources(arch: Architecture, present: Collection[str]) -> Mapping[str, Source]:
    """See `tidegate.model.registry.ArchitectureModule.sources`."""
    norms = {**llama_like.NORMS_BEFORE, **llama_like.QK_NORMS}
    parts = {**norms, **llama_like.ATTENTION, **llama_like.MLP}
    return llama_like.names(arch, parts, present)
