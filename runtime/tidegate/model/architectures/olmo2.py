"""OLMo 2: norms behind attention and MLP instead of before (OLMo Team 2024, arXiv:2501.00656).

Queries and keys are normed too, each as a whole row over all heads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tidegate.model import llama_like
from tidegate.model.architecture import Architecture
from tidegate.model.config import Config
from tidegate.model.registry import Source

_DEFAULTS: Config = {"rms_norm_eps": 1e-5}
_NORMS = {
    "attention_after_norm": "post_attention_layernorm",
    "mlp_after_norm": "post_feedforward_layernorm",
}


def describe(config: Config, context: int | None = None) -> Architecture:
    """Read an OLMo 2 config; see `tidegate.model.registry.describe`."""
    arch = llama_like.base({**_DEFAULTS, **config}, context)
    return replace(arch, qk_norm="row", norm_before=False, norm_after=True, mlp_bias=False)


def sources(arch: Architecture, present: Collection[str]) -> Mapping[str, Source]:
    """See `tidegate.model.registry.ArchitectureModule.sources`."""
    norms = {**_NORMS, **llama_like.QK_NORMS}
    return llama_like.names(arch, {**norms, **llama_like.ATTENTION, **llama_like.MLP}, present)
