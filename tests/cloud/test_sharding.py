"""The parts of a model: together they are the whole, and what cannot be cut is refused by name."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from hfcheckpoints import load_hf_model, write_hf_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from tinymodel import RandomWeights, tiny_architecture

from tidegate.cloud.gpu_memory import held_weights, weight_bytes
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.cloud.sharding import (
    Part,
    ShardedWeights,
    columns,
    head_of_table,
    padded,
    padded_head,
    rows,
    shard,
)
from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe_file import parse_recipe
from tidegate.converters.rounding.rtn import quantise
from tidegate.errors import ConfigError
from tidegate.kernels.weight_loading import load_weights
from tidegate.model.architecture import Architecture
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.packed import (
    Array,
    DenseLinear,
    Linear,
    LowRankLinear,
    PackedLinear,
    dense_weight,
)
from tidegate.model.packed_target import PackedWeights
from tidegate.model.roles import roles
from tidegate.model.stored import StoredLinear
from tidegate.model.walk import Weights


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
    with pytest.raises(
        ConfigError, match=r"tensor_parallel = 2: must be so few that 48 inputs are whole"
    ):
        columns(linears()[1], 0, 48, bias=True)


@given(vocab=st.integers(1, 300), world=st.integers(1, 8))
def test_the_parts_of_a_head_are_every_token_once(vocab: int, world: int) -> None:
    spans = [Part(rank=rank, world=world).head_rows(vocab) for rank in range(world)]
    assert [token for span in spans for token in range(*span)] == list(range(vocab))
    assert max(last - first for first, last in spans) <= padded_head(vocab, world)


RECIPE = """
name = "mixed"
[[formats]]
match = ["layers.1.*", "head"]
bits = 32
[[formats]]
match = ["*"]
group_size = 32
[[passes]]
kind = "low_rank"
match = ["layers.0.up", "layers.0.o"]
rank = 8
"""
WIDE = replace(
    tiny_architecture(tied_head=False), o_bias=True, mlp_bias=True, qkv_bias=True, vocab=205
)


@contextmanager
def of_checkpoint(folder: Path) -> Iterator[tuple[Architecture, Weights]]:
    write_checkpoint(folder / "in", WIDE, RandomWeights(WIDE))
    with Checkpoint.open(folder / "in") as checkpoint:
        yield checkpoint.decoder, checkpoint.weights()


@contextmanager
def of_bundle(folder: Path) -> Iterator[tuple[Architecture, Weights]]:
    write_checkpoint(folder / "in", WIDE, RandomWeights(WIDE))
    plan = ConversionPlan(model_id="m", targets=("packed",), recipe=parse_recipe(RECIPE, "mine"))
    bundle = convert(folder / "in", folder / "b", plan)
    with closing(PackedWeights(bundle.target_folder("packed"), WIDE)) as weights:
        assert isinstance(weights.linear("layers.0.o"), LowRankLinear)
        assert isinstance(weights.linear("layers.0.down"), PackedLinear)
        yield WIDE, weights


@contextmanager
def of_stacked_experts(folder: Path) -> Iterator[tuple[Architecture, Weights]]:
    apart = write_hf_checkpoint(folder / "apart", "qwen3_moe")
    load_hf_model(apart).save_pretrained(folder / "in", save_original_format=False)
    with Checkpoint.open(folder / "in") as checkpoint:
        yield checkpoint.decoder, checkpoint.weights()


class WholeWeights:
    """A source that cannot read parts."""

    def __init__(self, source: Weights) -> None:
        self._source = source

    def linear(self, role: str) -> Linear:
        return self._source.linear(role)

    def vector(self, role: str) -> Array:
        return self._source.vector(role)


@pytest.mark.parametrize("source", [of_checkpoint, of_bundle, of_stacked_experts])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_read_in_parts_is_what_is_cut_from_the_whole(
    source: Callable[[Path], AbstractContextManager[tuple[Architecture, Weights]]],
    rank: int,
    tmp_path: Path,
) -> None:
    with source(tmp_path) as (arch, weights):
        part, stored = Part(rank=rank, world=2), 0
        streamed = ShardedWeights(weights, arch, part)
        cut = ShardedWeights(WholeWeights(weights), arch, part)
        for name in (name for name, role in roles(arch).items() if role.is_linear):
            expected = cut.linear(name)
            assert_same(streamed.linear(name), expected, name)
            assert cut.stored(name) is None
            bits = streamed.stored(name)
            if bits is not None:
                stored += 1
                assert np.array_equal(widened(bits), dense_weight(expected)), name
                assert_equal_or_none(bits.bias, expected.bias, name)
        # Those experts are saved in 32 bits.
        assert (stored > 0) == (source is not of_stacked_experts)


def assert_same(found: Linear, expected: Linear, name: str) -> None:
    assert type(found) is type(expected), name
    assert (found.outputs, found.inputs) == (expected.outputs, expected.inputs), name
    assert np.array_equal(dense_weight(found), dense_weight(expected)), name
    assert_equal_or_none(found.bias, expected.bias, name)


def assert_equal_or_none(found: Array | None, expected: Array | None, name: str) -> None:
    assert (found is None) == (expected is None), name
    if found is not None and expected is not None:
        assert np.array_equal(found, expected), name


def widened(stored: StoredLinear) -> Array:
    assert stored.bfloat
    return (stored.values.astype(np.uint32) << 16).view(np.float32)


def test_a_group_that_would_be_cut_is_named_with_its_layer() -> None:
    arch = replace(tiny_architecture(), inner=96)
    weights = RandomWeights(
        arch, quantise=lambda _, one: quantise(one, bits=4, group_size=32, symmetric=False)
    )
    part = ShardedWeights(weights, arch, Part(rank=1, world=2))
    with pytest.raises(
        ConfigError, match=r"tensor_parallel = 2: .* groups of 32 \(layers\.1\.down"
    ):
        part.linear("layers.1.down")


def test_a_part_is_read_in_less_memory_than_the_whole(tmp_path: Path) -> None:
    arch = replace(tiny_architecture(layers=1), inner=4096, width=1024)
    write_checkpoint(tmp_path / "in", arch, RandomWeights(arch))
    with Checkpoint.open(tmp_path / "in") as checkpoint:
        part = ShardedWeights(checkpoint.weights(), arch, Part(rank=1, world=2))
        for role in ("layers.0.up", "layers.0.down"):
            tracemalloc.start()
            found = part.linear(role)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            whole = arch.inner * arch.width * 4
            assert found.outputs * found.inputs * 4 == whole // 2
            assert peak < 0.8 * whole, role


def test_a_table_apart_from_the_head_goes_to_every_device_as_its_bits(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", WIDE, RandomWeights(WIDE))
    with Checkpoint.open(tmp_path / "in") as checkpoint:
        whole, part = checkpoint.weights(), Part(rank=1, world=2)
        loaded = load_weights(
            shard(WIDE, 2),
            ShardedWeights(whole, WIDE, part),
            dtype=torch.bfloat16,
            device="cpu",
            head_part=partial(head_of_table, vocab=WIDE.vocab, part=part),
        )
        table = loaded.table(loaded.linear("embed"))
        assert isinstance(table, torch.Tensor)
        assert np.array_equal(table.float().numpy(), dense_weight(whole.linear("embed")))
        head = loaded.product([loaded.linear("head")])
        assert head is not None
        assert head.outputs == (103,)


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_device_holds_what_the_arithmetic_says(tied_head: bool, world: int) -> None:
    arch = replace(tiny_architecture(tied_head=tied_head), vocab=205)
    small, part = shard(arch, world), Part(rank=world - 1, world=world)
    whole = RandomWeights(arch)
    loaded = load_weights(
        small,
        whole if world == 1 else ShardedWeights(whole, arch, part),
        dtype=torch.float32,
        device="cpu",
        head_part=None if world == 1 else partial(head_of_table, vocab=arch.vocab, part=part),
    )
    norms = 4 * arch.width * (2 * arch.layers + 1)
    assert loaded.nbytes - norms == 4 * held_weights(small, world)
    settings = GpuSettings(activations="fp32", device="cpu")
    assert weight_bytes(small, settings, packed_bits=None, world=world) == loaded.nbytes - norms
    assert weight_bytes(small, settings, packed_bits=4, world=world) == (loaded.nbytes - norms) // 8


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_padded_layer_is_of_its_own_kind_and_gives_zeros_behind(which: int) -> None:
    whole = linears()[which]
    found = padded(whole, 30)
    assert type(found) is type(whole)
    assert np.array_equal(dense_weight(found)[:24], dense_weight(whole))
    assert not dense_weight(found)[24:].any()
    assert found.bias is not None
    assert not found.bias[24:].any()


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
    "tensor_parallel = 3: must be a divisor of the model's heads, 4": (tiny_architecture(), 3),
    "tensor_parallel = 2: must be 1 for a model whose norm spans": (
        replace(tiny_architecture(), qk_norm="row"),
        2,
    ),
    "tensor_parallel = 4: must be a divisor or a multiple of the model's kv_heads, 6": (
        replace(tiny_architecture(), heads=12, kv_heads=6),
        4,
    ),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_cannot_be_cut_is_refused_by_name(problem: str) -> None:
    arch, world = REFUSED[problem]
    with pytest.raises(ConfigError, match=problem):
        shard(arch, world)
