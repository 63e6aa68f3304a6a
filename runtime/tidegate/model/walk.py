"""The one forward pass of the project, written once over `Ops`.

Lowered to tensors it runs; lowered to a graph builder it converts. Weights are asked for in the
order they are used and not kept, so a lowering holds about one layer at a time.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from tidegate.model.architecture import Architecture
from tidegate.model.ops import Ops
from tidegate.model.packed import Array, Linear

X = TypeVar("X")


class Weights(Protocol):
    """A model's weights by role (see `ArchitectureModule.tensor_names`), read when asked for."""

    def linear(self, role: str) -> Linear:
        """The weight and bias of a linear layer or of the embedding table."""

    def vector(self, role: str) -> Array:
        """A norm's weight, float32 [width]."""


def decoder(ops: Ops[X], arch: Architecture, weights: Weights) -> X:
    """Walk a decoder from tokens to the logits of the gathered rows.

    Args:
        ops: the lowering; it knows the step's tokens, positions and KV cache.
        arch: the model.
        weights: by role; each is asked for once per walk, the tied table twice.
    """
    x = ops.embed(weights.linear("embed"))
    for layer in range(arch.layers):
        x = _layer(ops, arch, weights, x, layer)
    x = ops.rms_norm(ops.gather_rows(x), weights.vector("final_norm"), arch.norm_eps)
    return ops.head(x, weights.linear("embed" if arch.tied_head else "head"))


def _layer(ops: Ops[X], arch: Architecture, weights: Weights, x: X, layer: int) -> X:
    def linear(role: str) -> Linear:
        return weights.linear(f"layers.{layer}.{role}")

    h = ops.rms_norm(x, weights.vector(f"layers.{layer}.attention_norm"), arch.norm_eps)
    q, k, v = ops.linears(h, [linear("q"), linear("k"), linear("v")])
    attended = ops.attention(q, k, v, arch.attention(layer))
    (projected,) = ops.linears(attended, [linear("o")])
    x = ops.add(x, projected)
    h = ops.rms_norm(x, weights.vector(f"layers.{layer}.mlp_norm"), arch.norm_eps)
    mlp = ops.gated_mlp(h, linear("gate"), linear("up"), linear("down"), arch.activation)
    return ops.add(x, mlp)
