"""`Architecture`: everything the forward walk needs to know about a model, and nothing else.

It is read from a Hugging Face `config.json` by the module of `tidegate.model.architectures` that
bears the config's `model_type`; a new architecture adds one such module and touches nothing here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from tidegate.errors import CheckpointError

Activation = Literal["silu", "gelu", "gelu_tanh"]
"""Non-linearity of the gated MLP; `gelu` is the exact one, `gelu_tanh` the approximation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary position embedding in the rotate-half convention (Su et al. 2021, as in Llama).

    `head_size / 2` frequencies `theta ** (-2 i / head_size)`; scalings come with the
    architectures that use them.
    """

    theta: float = 10000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """One layer's attention: N query heads of H values sharing K key/value heads."""

    layer: int
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    """Factor on q.k before the softmax, usually `head_size ** -0.5`."""
    rope: Rope | None
    """None for a layer without position embedding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A decoder-only transformer, as the walk sees it. Sizes are in values, not bytes."""

    model_type: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    """Width of the gated MLP."""
    vocab: int
    context: int
    """Positions the model was trained for (`max_position_embeddings`)."""
    norm_eps: float
    activation: Activation
    rope: Rope
    tied_head: bool
    """The head is the embedding table."""
    attention_bias: bool = False
    mlp_bias: bool = False

    def attention(self, layer: int) -> AttentionSpec:
        """Attention of `layer`, 0-based."""
        return AttentionSpec(
            layer=layer,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            scale=self.head_size**-0.5,
            rope=self.rope,
        )

    @property
    def parameters(self) -> int:
        """Number of weights, norms and biases left out (under 0.1 % of any real model)."""
        attention = self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        tables = self.vocab * self.width * (1 if self.tied_head else 2)
        return tables + self.layers * (attention + 3 * self.width * self.inner)

    @property
    def kv_values_per_token(self) -> int:
        """Key plus value numbers kept per token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size


class ArchitectureModule(Protocol):
    """What a module in `tidegate.model.architectures` provides."""

    def describe(self, config: Mapping[str, object]) -> Architecture:
        """Read a Hugging Face config; raise `CheckpointError` naming a key it cannot honour."""

    def tensor_names(self, arch: Architecture) -> Mapping[str, str]:
        """Map every role the walk asks for, without `.weight`/`.bias`, to a checkpoint tensor.

        Roles: `embed`, `head` (absent when tied), `final_norm`, and per layer `i`
        `layers.i.{attention_norm,mlp_norm,q,k,v,o,gate,up,down}`.
        """


def known_model_types() -> tuple[str, ...]:
    """Every `model_type` that has a module, sorted."""
    package = importlib.import_module("tidegate.model.architectures")
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))


def architecture_module(model_type: str) -> ArchitectureModule:
    """The module of `model_type`; `CheckpointError` lists the known ones when there is none."""
    if model_type not in known_model_types():
        known = ", ".join(known_model_types())
        raise CheckpointError(f"config.json: model_type = {model_type!r}: must be one of {known}")
    module = importlib.import_module(f"tidegate.model.architectures.{model_type}")
    return cast(ArchitectureModule, module)


def describe(config: Mapping[str, object]) -> Architecture:
    """Read a Hugging Face `config.json` that has been parsed to a mapping.

    Raises:
        CheckpointError: `model_type` is missing or unknown, or a key has a value that the
            architecture's module cannot honour; the message names the key.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"config.json: model_type = {model_type!r}: must be a string")
    return architecture_module(model_type).describe(config)
