"""Gemma 3, text only: Gemma 2 with normed queries and keys, and two rotations, without soft caps.

Gemma Team 2025, arXiv:2503.19786. Five layers with a window, which rotate by
`rope_local_base_freq`, for each one without, which rotates by `rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tidegate.errors import CheckpointError
from tidegate.model import llama_like
from tidegate.model.architecture import Architecture, LayerKind
from tidegate.model.architectures import gemma2
from tidegate.model.config import (
    Config,
    mapping,
    optional_int,
    positive_float,
    positive_int,
    refuse_unless,
)
from tidegate.model.registry import Source

_DEFAULTS: Config = {
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_PARTS = {**gemma2.NORMS, **llama_like.QK_NORMS, **llama_like.ATTENTION, **llama_like.MLP}


def describe(config: Config, context: int | None = None) -> Architecture:
    """Read a Gemma 3 text config; see `tidegate.model.registry.describe`."""
    config = _with_rotations({**_DEFAULTS, **config})
    # Its own library reads the key and does nothing with it.
    refuse_unless(config, "attn_logit_softcapping", (), "null for this model_type")
    arch = replace(gemma2.base(config, context), qk_norm="head")
    every = positive_int(config, "sliding_window_pattern", 6)
    types = llama_like.layer_types(
        config,
        arch.layers,
        ["sliding_attention" if i % every else "full_attention" for i in range(1, arch.layers + 1)],
    )
    rotations = {
        kind: llama_like.rope(config, arch.head_size, context, kind) for kind in sorted(set(types))
    }
    windows = llama_like.windows(types, optional_int(config, "sliding_window"))
    kinds = zip(types, windows, strict=True)
    return llama_like.with_kinds(
        arch, [LayerKind(rope=rotations[kind], window=window) for kind, window in kinds]
    )


def sources(arch: Architecture, present: Collection[str]) -> Mapping[str, Source]:
    """See `tidegate.model.registry.ArchitectureModule.sources`."""
    return gemma2.norms_plus_one(llama_like.names(arch, _PARTS, present))


def _with_rotations(config: Config) -> Config:
    """`config` with one entry of `rope_parameters` for each layer type, whatever its spelling."""
    parameters, scaling = mapping(config, "rope_parameters"), mapping(config, "rope_scaling")
    if parameters and not any(kind in parameters for kind in llama_like.LAYER_TYPES):
        raise CheckpointError(
            f"config.json: rope_parameters = {parameters!r:.80}: must have an entry for each of "
            f"{llama_like.LAYER_TYPES}"
        )
    full, sliding = (mapping(parameters, kind) for kind in llama_like.LAYER_TYPES)
    slow = {"rope_theta": positive_float(config, "rope_theta", 1e6)}
    fast = {"rope_theta": positive_float(config, "rope_local_base_freq", 1e4)}
    both = [{**slow, **full, **scaling}, {**fast, **sliding}]
    entries = dict(zip(llama_like.LAYER_TYPES, both, strict=True))
    return {**config, "rope_parameters": entries, "rope_scaling": None}
