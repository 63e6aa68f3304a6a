"""SmolLM3: Llama whose every fourth layer has no position embedding (Hugging Face 2025).

NoPE layers as in Yang et al. 2025, arXiv:2501.18795. `no_rope_layers` holds a 1 for a layer that
rotates and a 0 for one that does not, whatever its name says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tidegate.errors import CheckpointError
from tidegate.model import llama_like
from tidegate.model.architecture import Architecture, LayerKind
from tidegate.model.config import Config, flag, optional_int, positive_int
from tidegate.model.registry import Source

_DEFAULTS: Config = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 4,
    "rope_theta": 2e6,
    "tie_word_embeddings": True,
}


def describe(config: Config, context: int | None = None) -> Architecture:
    """Read a SmolLM3 config; see `tidegate.model.registry.describe`."""
    config = {**_DEFAULTS, **config}
    arch = llama_like.base(config, context)
    rotated = _rotated_layers(config, arch.layers)
    window = optional_int(config, "sliding_window")
    if not flag(config, "use_sliding_window", False):
        window = None
    types = [llama_like.LAYER_TYPES[window is not None and not rotates] for rotates in rotated]
    windows = llama_like.windows(llama_like.layer_types(config, arch.layers, types), window)
    rope = arch.kinds[0].rope
    kinds = zip(rotated, windows, strict=True)
    return llama_like.with_kinds(
        arch, [LayerKind(rope=rope if rotates else None, window=one) for rotates, one in kinds]
    )


def sources(arch: Architecture, present: Collection[str]) -> Mapping[str, Source]:
    """See `tidegate.model.registry.ArchitectureModule.sources`."""
    parts = {**llama_like.NORMS_BEFORE, **llama_like.ATTENTION, **llama_like.MLP}
    return llama_like.names(arch, parts, present)


def _rotated_layers(config: Config, layers: int) -> list[bool]:
    """Whether each layer rotates its queries and keys."""
    found = config.get("no_rope_layers")
    if found is None:
        every = positive_int(config, "no_rope_layer_interval", 4)
        return [layer % every != 0 for layer in range(1, layers + 1)]
    known = isinstance(found, list) and all(item in (0, 1) for item in found)
    if not isinstance(found, list) or not known or len(found) < layers:
        raise CheckpointError(
            f"config.json: no_rope_layers = {found!r:.80}: must be a 0 or 1 for {layers} layers"
        )
    return [item == 1 for item in found[:layers]]
