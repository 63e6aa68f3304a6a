"""The one forward pass of the project, written once over `Ops`.

Lowered to tensors it runs; lowered to a graph builder it converts. Weights are asked for in the
order they are used and not kept, so a lowering holds about one layer at a time. The parts
(`embed`, `layer`, `logits` and their like for encoders) are public because calibration walks one
layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from tidegate.model.architecture import Architecture
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.ops import CommonOps, EncoderOps, GatedMlp, Ops
from tidegate.model.packed import Array, Linear

X = TypeVar("X")


class Weights(Protocol):
    """A model's weights by role (see `tidegate.model.roles`), read when asked for."""

    def linear(self, role: str) -> Linear:
        """The weight and bias of a linear layer or of an embedding table."""

    def vector(self, role: str) -> Array:
        """A norm's weight or bias, float32 [width], with what the model adds to it included."""


def decoder(
    ops: Ops[X],
    arch: Architecture,
    weights: Weights,
    behind_layer: Callable[[int, X], None] = lambda index, x: None,
) -> X:
    """Walk a decoder from tokens to the logits of the gathered rows.

    Args:
        ops: the lowering; it knows the step's tokens, positions and KV cache.
        arch: the model.
        weights: by role; each is asked for once per walk, the tied table twice.
        behind_layer: is given the residual stream behind each layer.
    """
    x = embed(ops, arch, weights)
    for index in range(arch.layers):
        x = layer(ops, arch, weights, x, index)
        behind_layer(index, x)
    return logits(ops, arch, weights, x)


def embed(ops: Ops[X], arch: Architecture, weights: Weights) -> X:
    """The residual stream as it enters the first layer."""
    return _scaled(ops, ops.embed(weights.linear("embed")), arch.embed_scale)


def layer(ops: Ops[X], arch: Architecture, weights: Weights, x: X, index: int) -> X:
    """The residual stream behind layer `index`."""
    attended = _attention(ops, arch, weights, x, index)
    x = ops.add(x, _scaled(ops, attended, arch.residual_scale))
    return ops.add(x, _scaled(ops, _mlp(ops, arch, weights, x, index), arch.residual_scale))


def logits(ops: Ops[X], arch: Architecture, weights: Weights, x: X) -> X:
    """Logits of the gathered rows of what the last layer gave."""
    x = ops.rms_norm(ops.gather_rows(x), weights.vector("final_norm"), arch.norm_eps)
    scores = ops.head(x, weights.linear("embed" if arch.tied_head else "head"))
    scores = _scaled(ops, scores, arch.head_scale)
    return scores if arch.head_softcap is None else ops.softcap(scores, arch.head_softcap)


def _attention(ops: Ops[X], arch: Architecture, weights: Weights, x: X, index: int) -> X:
    role = f"layers.{index}."
    if arch.norm_before:
        x = ops.rms_norm(x, weights.vector(role + "attention_norm"), arch.norm_eps)
    q, k, v = ops.linears(x, [weights.linear(role + part) for part in "qkv"])
    if arch.qk_norm != "none":
        q = ops.rms_norm(q, weights.vector(role + "q_norm"), arch.norm_eps)
        k = ops.rms_norm(k, weights.vector(role + "k_norm"), arch.norm_eps)
    if arch.qkv_clip is not None:
        q, k, v = (ops.clip(part, arch.qkv_clip) for part in (q, k, v))
    attended = ops.attention(q, k, v, arch.attention(index))
    (x,) = ops.linears(attended, [weights.linear(role + "o")])
    if arch.norm_after:
        x = ops.rms_norm(x, weights.vector(role + "attention_after_norm"), arch.norm_eps)
    return x


def _mlp(ops: Ops[X], arch: Architecture, weights: Weights, x: X, index: int) -> X:
    role = f"layers.{index}."
    if arch.norm_before:
        x = ops.rms_norm(x, weights.vector(role + "mlp_norm"), arch.norm_eps)
    experts = arch.kind(index).experts
    if experts is None:
        mlp = _gated_mlp(weights, role)
        x = ops.gated_mlp(x, mlp.gate, mlp.up, mlp.down, arch.activation)
    else:
        router = weights.linear(role + "router")

        def expert(number: int) -> GatedMlp:
            return _gated_mlp(weights, f"{role}experts.{number}.")

        x = ops.moe(x, router, expert, experts, arch.activation)
    if arch.norm_after:
        x = ops.rms_norm(x, weights.vector(role + "mlp_after_norm"), arch.norm_eps)
    return x


def _gated_mlp(weights: Weights, prefix: str) -> GatedMlp:
    gate, up, down = (weights.linear(prefix + part) for part in ("gate", "up", "down"))
    return GatedMlp(gate=gate, up=up, down=down)


def _scaled(ops: Ops[X], x: X, factor: float) -> X:
    return x if factor == 1.0 else ops.scale(x, factor)


def encoder(ops: EncoderOps[X], arch: EncoderArchitecture, weights: Weights) -> X:
    """Walk an encoder from tokens to [texts, width] embeddings or [texts, labels] logits."""
    x = encoder_embed(ops, arch, weights)
    for index in range(arch.layers):
        x = encoder_layer(ops, arch, weights, x, index)
    return pooled(ops, arch, weights, x)


def encoder_embed(ops: EncoderOps[X], arch: EncoderArchitecture, weights: Weights) -> X:
    """What enters the first layer of an encoder."""
    x = ops.embed(weights.linear("embed"))
    x = ops.add(x, ops.positions(weights.linear("positions")))
    if arch.token_types:
        x = ops.add(x, ops.token_types(weights.linear("token_types")))
    return _layer_norm(ops, arch, weights, x, "embed_norm")


def encoder_layer(
    ops: EncoderOps[X], arch: EncoderArchitecture, weights: Weights, x: X, index: int
) -> X:
    """What layer `index` of an encoder makes of its input."""
    role = f"layers.{index}."
    q, k, v = ops.linears(x, [weights.linear(role + part) for part in "qkv"])
    attended = ops.full_attention(q, k, v, arch.heads, arch.head_size**-0.5)
    x = ops.add(x, _linear(ops, weights, attended, role + "o"))
    x = _layer_norm(ops, arch, weights, x, role + "attention_norm")
    up, down = weights.linear(role + "up"), weights.linear(role + "down")
    x = ops.add(x, ops.mlp(x, up, down, arch.activation))
    return _layer_norm(ops, arch, weights, x, role + "mlp_norm")


def pooled(ops: EncoderOps[X], arch: EncoderArchitecture, weights: Weights, x: X) -> X:
    """One row per text of what the last layer of an encoder gave."""
    x = ops.pool(x, arch.pooling)
    if arch.pooler != "none":
        x = _linear(ops, weights, x, "pooler")
        x = ops.tanh(x) if arch.pooler == "tanh" else ops.activate(x, arch.pooler)
    if arch.labels:
        x = _linear(ops, weights, x, "classifier")
    return ops.unit(x) if arch.normalised else x


def _linear(ops: CommonOps[X], weights: Weights, x: X, role: str) -> X:
    (result,) = ops.linears(x, [weights.linear(role)])
    return result


def _layer_norm(
    ops: EncoderOps[X], arch: EncoderArchitecture, weights: Weights, x: X, role: str
) -> X:
    weight, bias = weights.vector(role), weights.vector(role + ".bias")
    return ops.layer_norm(x, weight, bias, arch.norm_eps)
