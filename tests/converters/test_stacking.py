"""Merging of linear layers: the same numbers, row under row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tidegate.converters.rounding.rtn import quantise
from tidegate.converters.stacking import stack, stacks
from tidegate.model.packed import Bits, DenseLinear, Linear, PackedLinear


def dense(outputs: int, inputs: int = 96) -> DenseLinear:
    rng = np.random.default_rng(outputs)
    return DenseLinear(weight=rng.standard_normal((outputs, inputs)).astype(np.float32))


def packed(
    outputs: int, *, bits: Bits = 4, group_size: int = 64, symmetric: bool = False
) -> PackedLinear:
    return quantise(dense(outputs), bits=bits, group_size=group_size, symmetric=symmetric)


def test_layers_that_agree_are_merged_and_the_others_are_not() -> None:
    layers: list[Linear] = [
        packed(8),
        packed(4, bits=8),
        packed(3),
        dense(5),
        packed(6, symmetric=True),
    ]
    assert stacks([*layers, dense(7), packed(2, group_size=32)]) == [[0, 2], [1], [3, 5], [4], [6]]


def test_a_merged_packed_layer_holds_the_integers_of_its_parts() -> None:
    parts = [packed(8), packed(3), packed(5)]
    merged = stack(parts)
    assert isinstance(merged, PackedLinear)
    weights = [part.dequantise() for part in parts]
    np.testing.assert_array_equal(merged.dequantise(), np.concatenate(weights))


def test_a_merged_dense_layer_is_the_weights_one_under_another() -> None:
    parts = [dense(8), dense(3)]
    merged = stack(parts)
    assert isinstance(merged, DenseLinear)
    np.testing.assert_array_equal(merged.weight, np.concatenate([part.weight for part in parts]))


def test_a_part_without_bias_adds_nothing() -> None:
    bias = np.arange(3, dtype=np.float32)
    merged = stack([packed(2), replace(packed(3), bias=bias)])
    assert merged.bias is not None
    np.testing.assert_array_equal(merged.bias, [0, 0, 0, 1, 2])
    assert stack([packed(2), packed(3)]).bias is None
