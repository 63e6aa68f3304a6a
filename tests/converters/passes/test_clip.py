"""Clipping on a block, with and without calibration."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from tinyblocks import TinyData, layer_block, spiky_sequences
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.passes import clip
from tidegate.converters.passes.base import PassModule, needs_data
from tidegate.converters.rounding.block_packing import nearest
from tidegate.model.packed import DenseLinear, PackedLinear
from tidegate.model.recipe import Format

ARCH = tiny_architecture(layers=1)
FORMAT = Format(bits=4, group_size=32)
ROLE = "layers.0.down"


def weighted_error(packed: PackedLinear, dense: DenseLinear, importance: torch.Tensor) -> float:
    return float((((packed.dequantise() - dense.weight) ** 2) * importance.numpy()).sum())


def test_errors_count_where_the_inputs_are_large() -> None:
    block = layer_block(ARCH, RandomWeights(ARCH, seed=1), 0, FORMAT)
    data = TinyData(block, ARCH, spiky_sequences(ARCH.width, seed=2))
    dense, importance = block.linears[ROLE], data.mean_square(ROLE)
    assert isinstance(dense, DenseLinear)
    clip.make(clip.Options(), (ROLE,)).apply(block, ARCH, data)
    packed = block.linears[ROLE]
    assert isinstance(packed, PackedLinear)
    plain = nearest(dense, FORMAT)
    assert weighted_error(packed, dense, importance) < weighted_error(plain, dense, importance)
    assert [role for role, linear in block.linears.items() if linear is packed] == [ROLE]


def test_without_weighting_it_needs_no_data() -> None:
    block = layer_block(ARCH, RandomWeights(ARCH, seed=1), 0, FORMAT)
    dense = block.linears[ROLE]
    assert isinstance(dense, DenseLinear)
    options = clip.Options(weighted=False)
    clip.make(options, ("*",)).apply(block, ARCH, None)
    packed = block.linears[ROLE]
    assert isinstance(packed, PackedLinear)
    assert np.array_equal(packed.values, nearest(dense, FORMAT).values)
    assert not options.needs_data
    assert clip.Options().needs_data
    module = cast(PassModule, clip)
    assert needs_data(module, clip.Options())
    assert not needs_data(module, options)
