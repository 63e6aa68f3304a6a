"""Folding: multiply the inputs of linear layers by scales and divide where the inputs come from.

The model computes the same, but the weights to be quantised, or the activations, are easier. A
scale can be taken out of a norm's weight, or out of the rows of the linear layer that made the
input, if nothing but linear things lie between:

    q k v                       the norm before attention
    router gate up (of all      the norm before the MLP
    experts)
    head (not tied)             the last norm
    o                           the rows of v; query heads that share a value head share scales
    down                        the rows of up, which the activated gate only multiplies

An encoder's q, k, v and up read a stream that also runs past them, so nothing can be folded there,
and neither across an activation, except ReLU, which lets a positive factor through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tidegate.converters.passes.base import Block
from tidegate.model.architecture import Architecture
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.packed import Array, DenseLinear, Linear, LowRankLinear, PackedLinear
from tidegate.model.recipe import matches
from tidegate.model.registry import AnyArchitecture


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """Linear layers with one input, and where a factor on that input can be taken out again."""

    readers: tuple[str, ...]
    """Roles of the layers; the first sees every token that any of them sees."""
    vectors: tuple[str, ...] = ()
    """The norm that makes the input (and its bias)."""
    writer: str | None = None
    """The linear layer whose rows make the input."""
    heads: tuple[int, int, int] | None = None
    """(K, N / K, H) where N / K query heads read the same K * H rows; None for a row an input."""
    refusal: str | None = None
    """Why nothing can be folded."""

    def shared(self, statistic: torch.Tensor) -> torch.Tensor:
        """The largest value of a statistic [in] among inputs that share a scale: [scales]."""
        if self.heads is None:
            return statistic
        return statistic.view(self.heads).amax(dim=1).flatten()

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """The scale of every input, [in]."""
        if self.heads is None:
            return scales
        kv_heads, share, size = self.heads
        return scales.view(kv_heads, 1, size).expand(kv_heads, share, size).flatten()


def foldable(arch: AnyArchitecture, block: Block, match: tuple[str, ...]) -> Iterator[Fold]:
    """The folds of a block that serve a layer that matches and will be packed.

    Those that are impossible are left out, with a note for each such layer.
    """
    for fold in folds(arch, block):
        served = [
            role for role in fold.readers if matches(role, match) and block.formats[role].bits != 32
        ]
        if fold.refusal is not None:
            block.notes |= dict.fromkeys(served, f"its inputs are not scaled: {fold.refusal}")
        elif served:
            yield fold


def reached(
    arch: AnyArchitecture,
    block: Block,
    match: tuple[str, ...],
    statistic: Callable[[str], torch.Tensor],
) -> Iterator[tuple[Fold, torch.Tensor]]:
    """The foldable groups, each with a statistic [in] of the input that its layers share.

    A group that no calibration token reaches is left out, with a note for each of its layers.
    """
    for fold in foldable(arch, block, match):
        try:
            found = statistic(fold.readers[0])
        except LookupError:
            note = "its inputs are not scaled: no calibration token reaches it"
            block.notes |= dict.fromkeys(fold.readers, note)
            continue
        yield fold, found


def folds(arch: AnyArchitecture, block: Block) -> Iterator[Fold]:
    """Every group of linear layers with one input in a block, foldable or with a refusal.

    They come in the order of the walk. Tables that are looked up have no input and are left out.
    """
    if block.layer is None:
        yield from _final(arch, block)
        return
    prefix = f"layers.{block.layer}."
    if isinstance(arch, EncoderArchitecture):
        found = _encoder_layer(arch, prefix)
    else:
        found = _decoder_layer(arch, block.layer, prefix)
    for fold in found:
        yield _checked(fold, block)


def apply(block: Block, fold: Fold, scales: torch.Tensor) -> None:
    """Multiply the readers' inputs by `scales` [scales] and divide where they come from.

    Outputs stay as they were but for float32 rounding.
    """
    assert fold.refusal is None
    factors: Array = scales.numpy()
    spread: Array = fold.spread(scales).numpy()
    for role in fold.readers:
        block.linears[role] = _scale_inputs(block.linears[role], spread)
    for role in fold.vectors:
        block.vectors[role] = block.vectors[role] / factors
    if fold.writer is not None:
        block.linears[fold.writer] = _divide_outputs(block.linears[fold.writer], factors)


def _final(arch: AnyArchitecture, block: Block) -> Iterator[Fold]:
    if "head" in block.linears:
        yield _checked(Fold(readers=("head",), vectors=("final_norm",)), block)
    for role in ("pooler", "classifier"):
        if role in block.linears:
            yield Fold(readers=(role,), refusal="it reads what pooling or an activation gives")


def _decoder_layer(arch: Architecture, layer: int, prefix: str) -> Iterator[Fold]:
    no_norm = None if arch.norm_before else "no norm stands before it"
    attention = () if no_norm else (prefix + "attention_norm",)
    yield Fold(readers=tuple(prefix + part for part in "qkv"), vectors=attention, refusal=no_norm)
    clipped = None if arch.qkv_clip is None else "the value it reads is cut to a limit"
    yield Fold(
        readers=(prefix + "o",),
        writer=prefix + "v",
        heads=(arch.kv_heads, arch.heads // arch.kv_heads, arch.head_size),
        refusal=clipped,
    )
    experts = arch.kind(layer).experts
    mlps = [prefix]
    readers: list[str] = []
    if experts is not None:
        mlps = [f"{prefix}experts.{number}." for number in range(experts.count)]
        readers = [prefix + "router"]
    readers += [mlp + part for mlp in mlps for part in ("gate", "up")]
    norm = () if no_norm else (prefix + "mlp_norm",)
    yield Fold(readers=tuple(readers), vectors=norm, refusal=no_norm)
    for mlp in mlps:
        yield Fold(readers=(mlp + "down",), writer=mlp + "up")


def _encoder_layer(arch: EncoderArchitecture, prefix: str) -> Iterator[Fold]:
    stream = "the norm before it also feeds the residual stream"
    yield Fold(readers=tuple(prefix + part for part in "qkv"), refusal=stream)
    yield Fold(readers=(prefix + "o",), writer=prefix + "v", heads=(arch.heads, 1, arch.head_size))
    yield Fold(readers=(prefix + "up",), refusal=stream)
    curved = None if arch.activation == "relu" else f"{arch.activation} lies before it"
    yield Fold(readers=(prefix + "down",), writer=prefix + "up", refusal=curved)


def _checked(fold: Fold, block: Block) -> Fold:
    """The fold, refused if a weight that it changes is packed already."""
    changed = (*fold.readers, *(() if fold.writer is None else (fold.writer,)))
    packed = [role for role in changed if _is_packed(block.linears[role])]
    if not packed or fold.refusal is not None:
        return fold
    return Fold(readers=fold.readers, refusal=f"{packed[0]} is packed already")


def _is_packed(linear: Linear) -> bool:
    if isinstance(linear, LowRankLinear):
        return _is_packed(linear.first) or _is_packed(linear.second)
    return isinstance(linear, PackedLinear)


def _scale_inputs(linear: Linear, factors: Array) -> Linear:
    if isinstance(linear, LowRankLinear):
        return LowRankLinear(first=_dense_inputs(linear.first, factors), second=linear.second)
    return _dense_inputs(linear, factors)


def _dense_inputs(linear: PackedLinear | DenseLinear, factors: Array) -> DenseLinear:
    assert isinstance(linear, DenseLinear)
    return DenseLinear(weight=linear.weight * factors, bias=linear.bias)


def _divide_outputs(linear: Linear, factors: Array) -> Linear:
    if isinstance(linear, LowRankLinear):
        return LowRankLinear(first=linear.first, second=_dense_outputs(linear.second, factors))
    return _dense_outputs(linear, factors)


def _dense_outputs(linear: PackedLinear | DenseLinear, factors: Array) -> DenseLinear:
    assert isinstance(linear, DenseLinear)
    bias = None if linear.bias is None else linear.bias / factors
    return DenseLinear(weight=linear.weight / factors[:, None], bias=bias)
