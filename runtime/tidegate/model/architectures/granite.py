"""Granite 3 dense: Llama with four multipliers (IBM 2024, Granite 3.0 Language Models).

On the embedding, on query times key in place of `head_dim ** -0.5`, on what attention and MLP add
to the residual stream, and, as a divisor, on the logits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tidegate.model import llama_like
from tidegate.model.architecture import Architecture
from tidegate.model.config import Config, positive_float
from tidegate.model.registry import Source


def describe(config: Config, context: int | None = None) -> Architecture:
    """Read a Granite config; see `tidegate.model.registry.describe`."""
    return replace(
        llama_like.base(config, context),
        attention_scale=positive_float(config, "attention_multiplier", 1.0),
        embed_scale=positive_float(config, "embedding_multiplier", 1.0),
        residual_scale=positive_float(config, "residual_multiplier", 1.0),
        head_scale=1 / positive_float(config, "logits_scaling", 1.0),
    )


def sources(arch: Architecture, present: Collection[str]) -> Mapping[str, Source]:
    """See `tidegate.model.registry.ArchitectureModule.sources`."""
    parts = {**llama_like.NORMS_BEFORE, **llama_like.ATTENTION, **llama_like.MLP}
    return llama_like.names(arch, parts, present)
