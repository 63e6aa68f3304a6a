"""Small random models for tests: an architecture and weights held in memory.

Shapes are chosen to be awkward where a backend allows it: grouped-query heads, a vocabulary that
is no power of two, an MLP that is not a multiple of the largest group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tidegate.model.architecture import Architecture, Rope
from tidegate.model.architectures.llama import tensor_names
from tidegate.model.packed import Array, DenseLinear, Linear


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
        rope=Rope(theta=10000.0),
        tied_head=tied_head,
    )


class RandomWeights:
    """Gaussian weights by role, the same for the same seed; `quantise` packs the linear ones."""

    def __init__(
        self,
        arch: Architecture,
        *,
        seed: int = 0,
        quantise: Callable[[str, DenseLinear], Linear] | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        attended, kv = arch.heads * arch.head_size, arch.kv_heads * arch.head_size
        shapes = {
            "q": (attended, arch.width),
            "k": (kv, arch.width),
            "v": (kv, arch.width),
            "o": (arch.width, attended),
            "gate": (arch.inner, arch.width),
            "up": (arch.inner, arch.width),
            "down": (arch.width, arch.inner),
            "embed": (arch.vocab, arch.width),
            "head": (arch.vocab, arch.width),
        }
        self._linears: dict[str, Linear] = {}
        self._vectors: dict[str, Array] = {}
        for role in tensor_names(arch):
            kind = role.rsplit(".", 1)[-1]
            if kind in shapes:
                # 0.15 keeps the top-two logit gaps of a random model well above rounding.
                dense = DenseLinear(
                    weight=(rng.standard_normal(shapes[kind]) * 0.15).astype(np.float32)
                )
                self._linears[role] = dense if quantise is None else quantise(role, dense)
            else:
                self._vectors[role] = (1 + 0.1 * rng.standard_normal(arch.width)).astype(np.float32)

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        return self._linears[role]

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        return self._vectors[role]
