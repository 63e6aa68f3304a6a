"""Tiles hold the same weight as the rows they were made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from packedlinears import random_packed

from tidegate.errors import ConfigError
from tidegate.kernels.linear.reference import linear, weight_matrix
from tidegate.kernels.linear.retile import can_merge, retile, to_gpu
from tidegate.kernels.linear.weights import TiledLinear
from tidegate.model.packed import DenseLinear, LowRankLinear, PackedLinear, dense_weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"),
    [
        (64, 128, 128),
        (70, 200, 64),
        (1, 96, 32),
        (130, 50, 16),
        (3, 300, 48),
        (5, 100, 100),
        (9, 6, 6),
    ],
)
def test_tiles_hold_the_weight_exactly(
    outputs: int, inputs: int, group: int, symmetric: bool, bits: int
) -> None:
    packed = random_packed(outputs, inputs, group, bits=bits, symmetric=symmetric)
    found = weight_matrix(retile([packed]))
    assert torch.equal(found, torch.from_numpy(packed.dequantise()))


def test_layers_that_share_an_input_become_one() -> None:
    parts = [
        random_packed(70, 96, 32, seed=1, bias=True),
        random_packed(20, 96, 32, seed=2, symmetric=False),
        random_packed(1, 96, 32, seed=3),
    ]
    merged = retile(parts)
    assert (merged.outputs, merged.inputs) == (91, 96)
    expected = np.concatenate([part.dequantise() for part in parts])
    assert torch.equal(weight_matrix(merged), torch.from_numpy(expected))
    assert merged.bias is not None
    assert torch.equal(merged.bias[70:], torch.zeros(21))
    assert torch.equal(merged.bias[:70], torch.from_numpy(parts[0].bias))


def test_layers_packed_in_different_ways_are_not_merged() -> None:
    four, eight = random_packed(8, 64, 32), random_packed(8, 64, 32, bits=8)
    assert not can_merge([four, eight])
    assert not can_merge([four, DenseLinear(weight=four.dequantise())])
    with pytest.raises(ValueError, match="2 layers"):
        retile([four, eight])


def test_groups_that_no_tile_fits_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="group_size = 24"):
        retile([random_packed(8, 72, 24)])


def test_every_kind_of_layer_multiplies_as_the_weight_it_stands_for() -> None:
    packed = random_packed(24, 40, 40, bias=True, bits=8)
    first = PackedLinear(
        values=packed.values, scales=packed.scales, zeros=None, inputs=40, bits=8, group_size=40
    )
    second = DenseLinear(weight=np.ones((5, 24), np.float32), bias=np.arange(5, dtype=np.float32))
    x = torch.randn(3, 40)
    for layer in (packed, second, LowRankLinear(first=first, second=second)):
        rows = x[:, : layer.inputs]
        found = linear(rows, to_gpu(layer, device="cpu", dtype=torch.float32))
        expected = rows.numpy() @ dense_weight(layer).T
        if layer.bias is not None:
            expected = expected + layer.bias
        assert np.allclose(found.numpy(), expected, atol=1e-4)


def test_tiles_that_cannot_hold_the_layer_are_refused() -> None:
    tiled = retile([random_packed(64, 64, 64)])
    with pytest.raises(ValueError, match="do not hold 65x64"):
        TiledLinear(
            values=tiled.values,
            scales=tiled.scales,
            zeros=None,
            bias=None,
            inputs=64,
            outputs=65,
            bits=4,
            step=64,
        )
