"""Packing: what no pass has packed is rounded to nearest, in the format its rule gives it.

Weights that still lie in the checkpoint are read a few rows at a time, so a table of any size
costs little more memory than its packed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tidegate.converters.driver.store import Pending
from tidegate.converters.rounding.rtn import Rows, quantise_rows
from tidegate.errors import ConversionError
from tidegate.model.linear_file import (
    PackedForm,
    both,
    plan_dense,
    plan_of,
    plan_packed,
)
from tidegate.model.packed import Array, DenseLinear, Linear, LowRankLinear
from tidegate.model.recipe import Format
from tidegate.model.walk import Weights


@runtime_checkable
class RowWeights(Protocol):
    """`Weights` that can be read a few rows at a time, as those of a checkpoint."""

    def by_rows(self, role: str) -> tuple[Rows, Array | None] | None:
        """See `tidegate.model.checkpoint.CheckpointWeights.by_rows`."""


def pack(role: str, linear: Linear, wanted: Format, *, clip: bool = False) -> Pending:
    """Store `linear`, with dense parts in the format `wanted`.

    Args:
        role: its name, in messages too.
        linear: what the passes left.
        wanted: how to store what is dense; 32 bits leave it so.
        clip: search each group's span, see `rounding.rtn`.
    """
    match linear:
        case DenseLinear() if wanted.bits != 32:
            return _pending(role, _Rows.of(linear), wanted, clip)
        case LowRankLinear():
            first = pack(f"{role}:first", linear.first, wanted, clip=clip)
            second = pack(f"{role}:second", linear.second, wanted, clip=clip)
            return Pending(
                plan=both(first.plan, second.plan),
                make=lambda: _product(first.make(), second.make()),
            )
        case _:
            return Pending(plan=plan_of(role, linear), make=lambda: linear)


def pack_from(
    weights: Weights, role: str, shape: tuple[int, ...], wanted: Format, *, clip: bool = False
) -> Pending:
    """Store the weight [out, in] of a role that no pass touches; it is read when it is made."""
    source = weights.by_rows(role) if isinstance(weights, RowWeights) else None
    if source is None:
        return pack(role, weights.linear(role), wanted, clip=clip)
    read, bias = source
    outputs, inputs = shape
    return _pending(role, _Rows(read=read, outputs=outputs, inputs=inputs, bias=bias), wanted, clip)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """A dense weight that is read some rows at a time."""

    read: Rows
    outputs: int
    inputs: int
    bias: Array | None

    @classmethod
    def of(cls, linear: DenseLinear) -> _Rows:
        weight = linear.weight
        return cls(
            read=lambda first, after: weight[first:after],
            outputs=linear.outputs,
            inputs=linear.inputs,
            bias=linear.bias,
        )


def _pending(role: str, rows: _Rows, wanted: Format, clip: bool) -> Pending:
    """`rows` in the format `wanted`."""
    bits = wanted.bits
    if bits == 32:
        plan = plan_dense(role, (rows.outputs, rows.inputs), bias=rows.bias is not None)
        return Pending(
            plan=plan,
            make=lambda: DenseLinear(weight=rows.read(0, rows.outputs), bias=rows.bias),
        )
    form = PackedForm(bits=bits, inputs=rows.inputs, group_size=wanted.group_size or rows.inputs)

    def make() -> Linear:
        try:
            return quantise_rows(
                rows.read,
                (rows.outputs, rows.inputs),
                bias=rows.bias,
                bits=bits,
                group_size=wanted.group_size,
                symmetric=wanted.symmetric,
                clip=clip,
            )
        except ConversionError as error:
            raise ConversionError(f"{role}: {error}") from error

    plan = plan_packed(
        role, rows.outputs, form, symmetric=wanted.symmetric, bias=rows.bias is not None
    )
    return Pending(plan=plan, make=make)


def _product(first: Linear, second: Linear) -> Linear:
    assert not isinstance(first, LowRankLinear)
    assert not isinstance(second, LowRankLinear)
    return LowRankLinear(first=first, second=second)
