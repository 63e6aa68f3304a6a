"""A model cut into equal parts for a group of devices: what each holds of every weight. Pure.

Heads and the MLP's inner width are split (Shoeybi et al. 2019): query, key, value, gate and up by
rows, o and down by columns, so a layer needs two sums over the group and nothing else. Where there
are more devices than key/value heads, neighbours hold the same one. The head is split by tokens of
the vocabulary, padded to equal parts; the embedding table, which is only looked up in, is not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from tidegate.errors import ConfigError
from tidegate.model.architecture import Architecture, Experts, LayerKind
from tidegate.model.cuts import WHOLE, Cut, CutWeights
from tidegate.model.packed import (
    Array,
    DenseLinear,
    Linear,
    LowRankLinear,
    PackedLinear,
)
from tidegate.model.stored import HasStored, StoredLinear
from tidegate.model.walk import Weights

SETTING: Final = "tensor_parallel"
"""What errors call the number of devices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One device of a group."""

    rank: int
    world: int

    def of(self, whole: int) -> tuple[int, int]:
        """First and last of its share of `whole`, which the group divides."""
        each = whole // self.world
        return self.rank * each, (self.rank + 1) * each

    def kv_heads(self, whole: int) -> tuple[int, int]:
        """First and last of its key/value heads; at least one."""
        if whole >= self.world:
            return self.of(whole)
        head = self.rank * whole // self.world
        return head, head + 1

    def head_rows(self, vocab: int) -> tuple[int, int]:
        """First and last of its rows of the head, of which the last part may have fewer."""
        each = padded_head(vocab, self.world)
        return min(vocab, self.rank * each), min(vocab, (self.rank + 1) * each)


def padded_head(vocab: int, world: int) -> int:
    """Rows of the head that every device computes."""
    return -(-vocab // world)


def shard(arch: Architecture, world: int) -> Architecture:
    """The model as one device of `world` sees it.

    Raises:
        ConfigError: something cannot be split so; it is named.
    """
    for name, value in (("heads", arch.heads), ("inner", arch.inner)):
        if value % world:
            raise ConfigError(SETTING, world, f"a divisor of the model's {name}, {value}")
    if arch.kv_heads % world and world % arch.kv_heads:
        allowed = f"a divisor or a multiple of the model's kv_heads, {arch.kv_heads}"
        raise ConfigError(SETTING, world, allowed)
    if arch.qk_norm == "row" and world > 1:
        raise ConfigError(SETTING, world, "1 for a model whose norm spans all heads of a row")
    return replace(
        arch,
        heads=arch.heads // world,
        kv_heads=max(1, arch.kv_heads // world),
        inner=arch.inner // world,
        kinds=tuple(_sharded_kind(kind, world) for kind in arch.kinds),
    )


def _sharded_kind(kind: LayerKind, world: int) -> LayerKind:
    experts = kind.experts
    if experts is None:
        return kind
    if experts.inner % world:
        raise ConfigError(SETTING, world, f"a divisor of an expert's width, {experts.inner}")
    narrow = Experts(
        count=experts.count,
        chosen=experts.chosen,
        inner=experts.inner // world,
        normalised=experts.normalised,
    )
    return replace(kind, experts=narrow)


class ShardedWeights:
    """`tidegate.model.walk.Weights` of one device, cut from the whole ones as they are read.

    A source that can read parts is asked for no more than the device's; of any other a whole layer
    is in memory until it is cut.
    """

    def __init__(self, source: Weights, arch: Architecture, part: Part) -> None:
        """Cut the weights of the whole `arch`."""
        self._source, self._arch, self._part = source, arch, part

    def vector(self, role: str) -> Array:
        """See `Weights`; norms are the same everywhere."""
        return self._source.vector(role)

    def linear(self, role: str) -> Linear:
        """See `Weights`.

        Raises:
            ConfigError: the cut is within a group of a packed weight; names the role.
        """
        cut, kind = self._cut(role), role.rpartition(".")[2]
        found = None
        if isinstance(self._source, CutWeights) and cut != WHOLE:
            found = self._source.part(role, cut)
        keeps_bias = cut.columns is None or self._part.rank == 0
        if found is None:
            found = _cut(role, self._source.linear(role), cut, self._part.world)
        if not keeps_bias:
            found = _without_bias(found)
        return (
            padded(found, padded_head(self._arch.vocab, self._part.world))
            if kind == "head"
            else found
        )

    def stored(self, role: str, cut: Cut = WHOLE) -> StoredLinear | None:
        """See `HasStored`; `cut` is this device's."""
        assert cut == WHOLE, "a part of a part is nobody's"
        if not isinstance(self._source, HasStored):
            return None
        cut = self._cut(role)
        found = self._source.stored(role, cut)
        if found is None:
            return None
        if cut.columns is not None and self._part.rank:
            found = replace(found, bias=None)
        missing = padded_head(self._arch.vocab, self._part.world) - len(found.values)
        if role != "head" or not missing:
            return found
        bias = None if found.bias is None else np.pad(found.bias, (0, missing))
        return replace(found, values=np.pad(found.values, ((0, missing), (0, 0))), bias=bias)

    def _cut(self, role: str) -> Cut:
        """What of a linear layer is this device's."""
        arch, part = self._arch, self._part
        inner = arch.inner
        if ".experts." in role:
            experts = arch.kind(int(role.split(".")[1])).experts
            assert experts is not None, "the role is an expert's"
            inner = experts.inner
        match role.rpartition(".")[2]:
            case "q":
                return Cut(rows=_times(part.of(arch.heads), arch.head_size))
            case "k" | "v":
                return Cut(rows=_times(part.kv_heads(arch.kv_heads), arch.head_size))
            case "o":
                return Cut(columns=_times(part.of(arch.heads), arch.head_size))
            case "gate" | "up":
                return Cut(rows=part.of(inner))
            case "down":
                return Cut(columns=part.of(inner))
            case "head":
                return Cut(rows=part.head_rows(arch.vocab))
            case _:
                return WHOLE


def _cut(role: str, whole: Linear, cut: Cut, world: int) -> Linear:
    """The part of a layer that was read whole."""
    if cut.rows is not None:
        return rows(whole, *cut.rows)
    if cut.columns is None:
        return whole
    try:
        return columns(whole, *cut.columns, bias=True)
    except ConfigError as error:
        raise ConfigError(SETTING, world, f"{error.allowed} ({role})") from error


def _without_bias(linear: Linear) -> Linear:
    match linear:
        case LowRankLinear():
            return LowRankLinear(first=linear.first, second=replace(linear.second, bias=None))
        case _:
            return replace(linear, bias=None)


def head_of_table(table: Linear, *, vocab: int, part: Part) -> Linear:
    """What one device computes of the head, padded to what every one does."""
    return padded(rows(table, *part.head_rows(vocab)), padded_head(vocab, part.world))


def _times(span: tuple[int, int], size: int) -> tuple[int, int]:
    return span[0] * size, span[1] * size


def rows(whole: Linear, first: int, last: int) -> Linear:
    """The outputs `first` up to, without, `last` of a layer."""
    bias = None if whole.bias is None else whole.bias[first:last]
    match whole:
        case DenseLinear():
            return DenseLinear(weight=whole.weight[first:last], bias=bias)
        case PackedLinear():
            zeros = None if whole.zeros is None else whole.zeros[first:last]
            return replace(
                whole,
                values=whole.values[first:last],
                scales=whole.scales[first:last],
                zeros=zeros,
                bias=bias,
            )
        case LowRankLinear():
            return LowRankLinear(first=whole.first, second=_single(rows(whole.second, first, last)))


def columns(whole: Linear, first: int, last: int, *, bias: bool) -> Linear:
    """The inputs `first` up to, without, `last` of a layer; with `bias`, it keeps its bias.

    Raises:
        ConfigError: the cut is within a group of a packed weight.
    """
    kept = whole.bias if bias else None
    match whole:
        case DenseLinear():
            weight = np.ascontiguousarray(whole.weight[:, first:last])
            return DenseLinear(weight=weight, bias=kept)
        case PackedLinear():
            size = whole.group_size
            if first % size or (last % size and last != whole.inputs):
                allowed = f"so few that {last - first} inputs are whole groups of {size}"
                raise ConfigError(SETTING, whole.inputs // (last - first), allowed)
            groups = slice(first // size, -(-last // size))
            zeros = None if whole.zeros is None else whole.zeros[:, groups]
            return replace(
                whole,
                values=np.ascontiguousarray(whole.values[:, groups]),
                scales=np.ascontiguousarray(whole.scales[:, groups]),
                zeros=None if zeros is None else np.ascontiguousarray(zeros),
                bias=kept,
                inputs=last - first,
            )
        case LowRankLinear():
            second = whole.second if bias else replace(whole.second, bias=None)
            inner = columns(whole.first, first, last, bias=False)
            return LowRankLinear(first=_single(inner), second=second)


def padded(linear: Linear, outputs: int) -> Linear:
    """With rows of zeros behind its own, up to `outputs`; packed ones have scales of 0."""
    missing = outputs - linear.outputs
    if not missing:
        return linear
    behind = ((0, missing), (0, 0))
    bias = None if linear.bias is None else np.pad(linear.bias, (0, missing))
    match linear:
        case DenseLinear():
            return DenseLinear(weight=np.pad(linear.weight, behind), bias=bias)
        case PackedLinear():
            return replace(
                linear,
                values=np.pad(linear.values, (*behind, (0, 0))),
                scales=np.pad(linear.scales, behind),
                zeros=None if linear.zeros is None else np.pad(linear.zeros, behind),
                bias=bias,
            )
        case LowRankLinear():
            second = _single(padded(linear.second, outputs))
            return LowRankLinear(first=linear.first, second=second)


def _single(linear: Linear) -> DenseLinear | PackedLinear:
    assert not isinstance(linear, LowRankLinear), "a part of one layer is one layer"
    return linear
