"""Roles: the names by which the walk asks for weights, and the shape that each must have.

    embed, head (absent when tied), final_norm
    layers.i.  q k v o gate up down                     linear layers
               attention_norm mlp_norm                  with `norm_before`
               attention_after_norm mlp_after_norm      with `norm_after`
               q_norm k_norm                            with `qk_norm`
               router, experts.e.gate|up|down           in place of gate up down, with experts

and of an encoder: embed, positions, token_types, embed_norm, pooler, classifier, and per layer
q k v o up down attention_norm mlp_norm; a norm's bias has the role of the norm and `.bias`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tidegate.model.architecture import Architecture
from tidegate.model.encoder import EncoderArchitecture


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """What the walk expects under a role."""

    shape: tuple[int, ...]
    """[out, in] of a linear layer or table, [width] of a norm."""
    bias: bool = False
    """Whether the linear layer must come with a bias."""

    @property
    def is_linear(self) -> bool:
        """A linear layer or an embedding table, and not a norm."""
        return len(self.shape) == 2


def roles(arch: Architecture | EncoderArchitecture) -> dict[str, Role]:
    """Every role of a model, in the order in which the walk asks for them."""
    if isinstance(arch, EncoderArchitecture):
        return dict(_encoder_roles(arch))
    return dict(_decoder_roles(arch))


def layer_roles(arch: Architecture | EncoderArchitecture, layer: int) -> dict[str, Role]:
    """The roles of one layer, by their full names."""
    if isinstance(arch, EncoderArchitecture):
        return dict(_encoder_layer(arch, layer))
    return dict(_layer(arch, layer))


def _decoder_roles(arch: Architecture) -> Iterator[tuple[str, Role]]:
    yield "embed", Role(shape=(arch.vocab, arch.width))
    for layer in range(arch.layers):
        yield from _layer(arch, layer)
    yield "final_norm", Role(shape=(arch.width,))
    if not arch.tied_head:
        yield "head", Role(shape=(arch.vocab, arch.width))


def _layer(arch: Architecture, layer: int) -> Iterator[tuple[str, Role]]:
    prefix, norm = f"layers.{layer}.", Role(shape=(arch.width,))
    if arch.norm_before:
        yield prefix + "attention_norm", norm
    sizes = {"q": arch.heads * arch.head_size, "k": arch.kv_heads * arch.head_size}
    for part in "qkv":
        shape = (sizes.get(part, sizes["k"]), arch.width)
        yield prefix + part, Role(shape=shape, bias=arch.qkv_bias)
    for part, size in sizes.items():
        if arch.qk_norm != "none":
            whole = arch.qk_norm == "row"
            yield prefix + f"{part}_norm", Role(shape=(size if whole else arch.head_size,))
    yield prefix + "o", Role(shape=(arch.width, sizes["q"]), bias=arch.o_bias)
    if arch.norm_after:
        yield prefix + "attention_after_norm", norm
    if arch.norm_before:
        yield prefix + "mlp_norm", norm
    yield from _mlp(arch, layer, prefix)
    if arch.norm_after:
        yield prefix + "mlp_after_norm", norm


def _mlp(arch: Architecture, layer: int, prefix: str) -> Iterator[tuple[str, Role]]:
    experts = arch.kind(layer).experts
    if experts is None:
        yield from _gated_mlp(prefix, arch.width, arch.inner, arch.mlp_bias)
        return
    yield prefix + "router", Role(shape=(experts.count, arch.width))
    for number in range(experts.count):
        yield from _gated_mlp(f"{prefix}experts.{number}.", arch.width, experts.inner, False)


def _gated_mlp(prefix: str, width: int, inner: int, bias: bool) -> Iterator[tuple[str, Role]]:
    for part in ("gate", "up"):
        yield prefix + part, Role(shape=(inner, width), bias=bias)
    yield prefix + "down", Role(shape=(width, inner), bias=bias)


def _encoder_roles(arch: EncoderArchitecture) -> Iterator[tuple[str, Role]]:
    tables = {"embed": arch.vocab, "positions": arch.context, "token_types": arch.token_types}
    for name, rows in tables.items():
        if rows:
            yield name, Role(shape=(rows, arch.width))
    yield from _norm("embed_norm", arch.width)
    for layer in range(arch.layers):
        yield from _encoder_layer(arch, layer)
    if arch.pooler != "none":
        yield "pooler", Role(shape=(arch.width, arch.width), bias=True)
    if arch.labels:
        yield "classifier", Role(shape=(len(arch.labels), arch.width), bias=True)


def _encoder_layer(arch: EncoderArchitecture, layer: int) -> Iterator[tuple[str, Role]]:
    prefix = f"layers.{layer}."
    for part in "qkvo":
        yield prefix + part, Role(shape=(arch.width, arch.width), bias=True)
    yield from _norm(prefix + "attention_norm", arch.width)
    yield prefix + "up", Role(shape=(arch.inner, arch.width), bias=True)
    yield prefix + "down", Role(shape=(arch.width, arch.inner), bias=True)
    yield from _norm(prefix + "mlp_norm", arch.width)


def _norm(role: str, width: int) -> Iterator[tuple[str, Role]]:
    yield role, Role(shape=(width,))
    yield role + ".bias", Role(shape=(width,))
