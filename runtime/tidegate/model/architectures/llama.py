"""Llama and everything saved as `model_type: llama` (Llama 2/3, TinyLlama, SmolLM, ...).

Pre-norm decoder with grouped-query attention, rotary positions and a SiLU-gated MLP
(Touvron et al. 2023, arXiv:2307.09288).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tidegate.model import llama_like
from tidegate.model.architecture import Architecture
from tidegate.model.config import Config
from tidegate.model.registry import Source


def describe(config: Config, context: int | None = None) -> Architecture:
    """Read a Llama config; see `tidegate.model.registry.describe`."""
    return llama_like.base(config, context)


def sources(arch: Architecture, present: Collection[str]) -> Mapping[str, Source]:
    """See `tidegate.model.registry.ArchitectureModule.sources`."""
    parts = {**llama_like.NORMS_BEFORE, **llama_like.ATTENTION, **llama_like.MLP}
    return llama_like.names(arch, parts, present)
