"""Small random models for tests: an architecture and weights held in memory.

Shapes are chosen to be awkward where a backend allows it: grouped-query heads, a vocabulary that
is no power of two, an MLP that is not a multiple of the largest group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tidegate.model.architecture import Architecture, LayerKind
from tidegate.model.packed import Array, DenseLinear, Linear
from tidegate.model.registry import AnyArchitecture
from tidegate.model.roles import roles
from tidegate.model.rope import Rope


def tiny_architecture(
    *, layers: int = 2, tied_head: bool = True, context: int = 256, width: int = 128
) -> Architecture:
    """A Llama of a few hundred thousand weights: 4 query heads on 2 key/value heads of 32."""
    return Architecture(
        model_type="llama",
        layers=layers,
        width=width,
        heads=4,
        kv_heads=2,
        head_size=32,
        inner=192,
        vocab=203,
        context=context,
        norm_eps=1e-5,
        activation="silu",
        kinds=(LayerKind(rope=Rope.plain(10000.0, 32)),),
        attention_scale=32**-0.5,
        tied_head=tied_head,
    )


class RandomWeights:
    """Gaussian weights by role, the same for the same seed; `quantise` packs the linear ones."""

    def __init__(
        self,
        arch: AnyArchitecture,
        *,
        seed: int = 0,
        quantise: Callable[[str, DenseLinear], Linear] | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        self._linears: dict[str, Linear] = {}
        self._vectors: dict[str, Array] = {}
        for name, role in roles(arch).items():
            noise = rng.standard_normal(role.shape)
            if role.is_linear:
                # 0.15 keeps the top-two logit gaps of a random model well above rounding.
                bias = rng.standard_normal(role.shape[0]) * 0.15 if role.bias else None
                dense = DenseLinear(
                    weight=(noise * 0.15).astype(np.float32),
                    bias=None if bias is None else bias.astype(np.float32),
                )
                self._linears[name] = dense if quantise is None else quantise(name, dense)
            else:
                mean = 0 if name.endswith(".bias") else 1
                self._vectors[name] = (mean + 0.1 * noise).astype(np.float32)

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        return self._linears[role]

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        return self._vectors[role]
