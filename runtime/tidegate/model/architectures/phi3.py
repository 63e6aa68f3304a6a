"""Phi-3 and Phi-4-mini: Llama with fused tensors, partial rotation and LongRoPE.

Abdin et al. 2024, arXiv:2404.14219. Query, key and value lie in one tensor, one above the other,
and so do gate and up. Early configs call the rotation "su" or "yarn"; both mean "longrope".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tidegate.errors import CheckpointError
from tidegate.model import llama_like
from tidegate.model.architecture import Architecture
from tidegate.model.config import Config, mapping, optional_int, text
from tidegate.model.registry import Source

_DEFAULTS: Config = {
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
_ROPE_NAMES = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}


def describe(config: Config, context: int | None = None) -> Architecture:
    """Read a Phi-3 config; see `tidegate.model.registry.describe`."""
    config = _with_rope_type({**_DEFAULTS, **config})
    arch = replace(
        llama_like.base(config, context, partial_rotation=True),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
    )
    return llama_like.with_windows(arch, [optional_int(config, "sliding_window")] * arch.layers)


def sources(arch: Architecture, present: Collection[str]) -> Mapping[str, Source]:
    """See `tidegate.model.registry.ArchitectureModule.sources`."""
    parts = {**llama_like.NORMS_BEFORE, "o": "self_attn.o_proj", "down": "mlp.down_proj"}
    found = llama_like.names(arch, parts, present)
    for layer in range(arch.layers):
        prefix = f"model.layers.{layer}."
        for role, rows in _rows(arch).items():
            fused = "self_attn.qkv_proj" if role in "qkv" else "mlp.gate_up_proj"
            source = llama_like.linear(prefix + fused, present, rows=rows)
            found[f"layers.{layer}.{role}"] = source
    return found


def _rows(arch: Architecture) -> dict[str, tuple[int, int]]:
    """Where each role lies in its fused tensor."""
    q, kv = arch.heads * arch.head_size, arch.kv_heads * arch.head_size
    return {
        "q": (0, q),
        "k": (q, q + kv),
        "v": (q + kv, q + 2 * kv),
        "gate": (0, arch.inner),
        "up": (arch.inner, 2 * arch.inner),
    }


def _with_rope_type(config: Config) -> Config:
    """`config` with the rope type by the name it has elsewhere."""
    for key in ("rope_scaling", "rope_parameters"):
        found = mapping(config, key)
        if found:
            name = text(found, "rope_type", text(found, "type", "default"))
            if name not in _ROPE_NAMES:
                raise CheckpointError(
                    f"config.json: rope_type = {name!r:.80}: must be one of {list(_ROPE_NAMES)}"
                )
            config = {**config, key: {**found, "rope_type": _ROPE_NAMES[name]}}
    return config
