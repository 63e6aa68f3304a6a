"""The parts of a model: together they are the whole, and what cannot be cut is refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinymodel import RandomWeights, tiny_architecture

from tidegate.cloud.sharding import Part, ShardedWeights, columns, padded_head, rows, shard
from tidegate.converters.rounding.rtn import quantise
from tidegate.errors import ConfigError
from tidegate.model.architecture import Architecture
from tidegate.model.packed import DenseLinear, Linear, LowRankLinear, dense_weight
from tidegate.model.roles import roles


def linears() -> list[Linear]:
    """24 inputs and 96 outputs, dense, packed and as factors, with a bias."""
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((24, 96)), rng.standard_normal(24)
    dense = DenseLinear(weight=weight.astype(np.float32), bias=bias.astype(np.float32))
    packed = quantise(dense, bits=4, group_size=32, symmetric=False)
    factor = DenseLinear(weight=rng.standard_normal((7, 96)).astype(np.float32))
    second = DenseLinear(weight=rng.standard_normal((24, 7)).astype(np.float32), bias=dense.bias)
    return [dense, packed, LowRankLinear(first=factor, second=second)]


@given(cut=st.integers(1, 23), which=st.integers(0, 2))
def test_rows_of_a_layer_one_below_another_are_the_layer(cut: int, which: int) -> None:
    whole = linears()[which]
    parts = [rows(whole, 0, cut), rows(whole, cut, 24)]
    assert np.allclose(np.concatenate([dense_weight(one) for one in parts]), dense_weight(whole))
    assert whole.bias is not None
    biases = [one.bias for one in parts if one.bias is not None]
    assert np.array_equal(np.concatenate(biases), whole.bias)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_sum_over_columns_is_the_layer_with_one_bias(which: int) -> None:
    whole, x = linears()[which], np.random.default_rng(1).standard_normal(96).astype(np.float32)
    total = np.zeros(24, np.float32)
    for first, last in ((0, 32), (32, 96)):
        part = columns(whole, first, last, bias=first == 0)
        total += dense_weight(part) @ x[first:last]
        total += 0 if part.bias is None else part.bias
    assert whole.bias is not None
    assert np.allclose(total, dense_weight(whole) @ x + whole.bias, atol=1e-4)


def test_a_cut_within_a_packed_group_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"devices = 2: must be so few that 48 inputs are whole"):
        columns(linears()[1], 0, 48, bias=True)


@given(vocab=st.integers(1, 300), world=st.integers(1, 8))
def test_the_parts_of_a_head_are_every_token_once(vocab: int, world: int) -> None:
    spans = [Part(rank=rank, world=world).head_rows(vocab) for rank in range(world)]
    assert [token for span in spans for token in range(*span)] == list(range(vocab))
    assert max(last - first for first, last in spans) <= padded_head(vocab, world)


def test_more_devices_than_heads_of_keys_share_them() -> None:
    heads = [Part(rank=rank, world=8).kv_heads(2) for rank in range(8)]
    assert heads == [(0, 1)] * 4 + [(1, 2)] * 4


def test_every_part_has_the_shapes_that_its_architecture_asks_for() -> None:
    arch = replace(tiny_architecture(tied_head=False), qkv_bias=True, vocab=202)
    small = shard(arch, 2)
    for rank in range(2):
        part = ShardedWeights(RandomWeights(arch), arch, Part(rank=rank, world=2))
        for name, role in roles(small).items():
            if role.is_linear:
                found = part.linear(name)
                head = name == "head"
                assert (found.outputs, found.inputs) == ((101, 128) if head else role.shape)
                assert (found.bias is not None) == role.bias
            else:
                assert part.vector(name).shape == role.shape


REFUSED: dict[str, tuple[Architecture, int]] = {
    "devices = 3: must be a divisor of the model's heads, 4": (tiny_architecture(), 3),
    "devices = 2: must be 1 for a model whose norm spans": (
        replace(tiny_architecture(), qk_norm="row"),
        2,
    ),
    "devices = 4: must be a divisor or a multiple of the model's kv_heads, 6": (
        replace(tiny_architecture(), heads=12, kv_heads=6),
        4,
    ),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_cannot_be_cut_is_refused_by_name(problem: str) -> None:
    arch, world = REFUSED[problem]
    with pytest.raises(ConfigError, match=problem):
        shard(arch, world)
