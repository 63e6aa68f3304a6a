"""Merging of linear layers that share an input: one matrix product, then a split.

Layers merge when their weights agree in kind, bits, group size and symmetry. The integers and
scales are those of the parts, row under row, so a merged layer computes the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tidegate.model.packed import Array, DenseLinear, Linear, LowRankLinear, PackedLinear


def stacks(weights: Sequence[Linear]) -> list[list[int]]:
    """Positions of `weights` that can be merged, in order; one list per merged layer."""
    found: dict[tuple[object, ...], list[int]] = {}
    for position, linear in enumerate(weights):
        found.setdefault(_shape(linear), []).append(position)
    return list(found.values())


def stack(weights: Sequence[Linear]) -> Linear:
    """One layer with the outputs of all of them, which must agree as `stacks` says."""
    if len(weights) == 1:
        return weights[0]
    packed = [linear for linear in weights if isinstance(linear, PackedLinear)]
    if not packed:
        dense = [linear.weight for linear in weights if isinstance(linear, DenseLinear)]
        return DenseLinear(weight=np.concatenate(dense), bias=stacked_bias(weights))
    zeros = [linear.zeros for linear in packed if linear.zeros is not None]
    return PackedLinear(
        values=np.concatenate([linear.values for linear in packed]),
        scales=np.concatenate([linear.scales for linear in packed]),
        zeros=np.concatenate(zeros) if zeros else None,
        bias=stacked_bias(weights),
        inputs=packed[0].inputs,
        bits=packed[0].bits,
        group_size=packed[0].group_size,
    )


def _shape(linear: Linear) -> tuple[object, ...]:
    if isinstance(linear, LowRankLinear):
        return (id(linear),)
    if isinstance(linear, DenseLinear):
        return ("dense", linear.inputs)
    return (linear.bits, linear.group_size, linear.inputs, linear.zeros is None)


def stacked_bias(weights: Sequence[Linear]) -> Array | None:
    """The biases one after another; a layer without one adds 0."""
    if all(linear.bias is None for linear in weights):
        return None
    parts = [
        np.zeros(linear.outputs, np.float32) if linear.bias is None else linear.bias
        for linear in weights
    ]
    return np.concatenate(parts)
