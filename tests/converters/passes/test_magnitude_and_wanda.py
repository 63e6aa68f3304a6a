"""Pruning single weights: the right ones go, zeros survive packing, nothing left out silently."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from giveninputs import GivenInputs, given_block, random_linear, uneven_inputs
from tinymodel import tiny_architecture

from tidegate.converters.passes import magnitude, wanda
from tidegate.converters.passes.base import Block, PassError
from tidegate.converters.pruning.sparsity import Pattern, Sparsity
from tidegate.converters.rounding.rtn import quantise
from tidegate.model.packed import DenseLinear, PackedLinear

ARCH = tiny_architecture()
DOWN = "layers.0.down"


def prune(
    kind: str, block: Block, options: Sparsity, inputs: torch.Tensor | None = None
) -> np.ndarray:
    """The weight of `DOWN` after the pass."""
    if kind == "magnitude":
        magnitude.make(options, ("*",)).apply(block, ARCH, None)
    else:
        rows = {} if inputs is None else dict.fromkeys(block.linears, inputs)
        wanda.make(options, ("*",)).apply(block, ARCH, GivenInputs(rows))
    linear = block.linears[DOWN]
    assert isinstance(linear, DenseLinear)
    return linear.weight


def test_magnitude_drops_the_smallest_weights_of_the_whole_layer() -> None:
    linear = random_linear(24, 64, bias=True)
    linear.weight[:4] *= 0.01
    block = given_block({DOWN: linear})
    weight = prune("magnitude", block, Sparsity(sparsity=0.5))
    limit = np.median(np.abs(linear.weight))
    assert np.array_equal(weight, np.where(np.abs(linear.weight) < limit, 0, linear.weight))
    assert not weight[:4].any()
    assert block.linears[DOWN].bias is linear.bias


def test_wanda_drops_by_weight_times_input_in_every_row() -> None:
    linear, inputs = random_linear(24, 64), uneven_inputs(64)
    weight = prune("wanda", given_block({DOWN: linear}), Sparsity(sparsity=0.25), inputs)
    scores = np.abs(linear.weight) * np.sqrt(np.square(inputs.numpy()).mean(axis=0))
    for row, before, score in zip(weight, linear.weight, scores, strict=True):
        gone = np.argsort(score)[:16]
        expected = before.copy()
        expected[gone] = 0
        assert np.array_equal(row, expected)


def test_wanda_errs_less_than_magnitude_on_the_inputs_it_saw() -> None:
    linear, inputs = random_linear(48, 96), uneven_inputs(96)
    errors = {}
    for kind in ("magnitude", "wanda"):
        weight = prune(kind, given_block({DOWN: linear}), Sparsity(), inputs)
        errors[kind] = float(np.square(inputs.numpy() @ (weight - linear.weight).T).sum())
    assert errors["wanda"] < 0.8 * errors["magnitude"]


@pytest.mark.parametrize("kind", ["magnitude", "wanda"])
def test_two_of_four_neighbouring_inputs_become_zero(kind: str) -> None:
    linear, inputs = random_linear(24, 64), uneven_inputs(64)
    weight = prune(kind, given_block({DOWN: linear}), Sparsity(pattern="2:4"), inputs)
    assert ((weight.reshape(-1, 4) == 0).sum(axis=1) == 2).all()


def test_wanda_prunes_at_two_of_four_what_counts_less_in_each_four() -> None:
    linear, inputs = random_linear(24, 64), uneven_inputs(64)
    weight = prune("wanda", given_block({DOWN: linear}), Sparsity(pattern="2:4"), inputs)
    scores = np.abs(linear.weight) * np.sqrt(np.square(inputs.numpy()).mean(axis=0))
    fours, kept = scores.reshape(-1, 4), weight.reshape(-1, 4) != 0
    assert (
        np.where(kept, np.inf, fours).max(axis=1, where=~kept, initial=0)
        <= np.where(kept, fours, np.inf).min(axis=1)
    ).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("pattern", ["none", "2:4"])
@pytest.mark.parametrize("kind", ["magnitude", "wanda"])
def test_zeros_stay_zeros_when_the_layer_is_packed(
    kind: str, pattern: Pattern, bits: int, symmetric: bool
) -> None:
    linear, inputs = random_linear(24, 96), uneven_inputs(96)
    weight = prune(kind, given_block({DOWN: linear}), Sparsity(pattern=pattern), inputs)
    packed = quantise(
        DenseLinear(weight=weight),
        bits=8 if bits == 8 else 4,
        group_size=64,
        symmetric=symmetric,
    )
    assert (packed.dequantise()[weight == 0] == 0).all()
    assert (weight == 0).mean() == 0.5


def test_a_table_and_a_packed_layer_are_left_and_noted() -> None:
    table = given_block({"embed": random_linear(50, 32)}, name="embed")
    magnitude.make(Sparsity(), ("*",)).apply(table, ARCH, None)
    assert "table" in table.notes["embed"]
    packed = quantise(random_linear(8, 64), bits=4, group_size=32, symmetric=False)
    block = given_block({DOWN: packed})
    magnitude.make(Sparsity(), ("*",)).apply(block, ARCH, None)
    assert isinstance(block.linears[DOWN], PackedLinear)
    assert "PackedLinear" in block.notes[DOWN]


def test_wanda_leaves_and_notes_what_no_token_reached() -> None:
    linear = random_linear(8, 32)
    block = given_block({DOWN: linear, "layers.0.up": random_linear(8, 32)})
    data = GivenInputs({"layers.0.up": uneven_inputs(32)})
    wanda.make(Sparsity(), ("*",)).apply(block, ARCH, data)
    assert block.linears[DOWN] is linear
    assert "no token reached" in block.notes[DOWN]
    assert "layers.0.up" not in block.notes


def test_only_roles_that_match_are_pruned() -> None:
    up = random_linear(8, 32)
    block = given_block({DOWN: random_linear(8, 32), "layers.0.up": up})
    magnitude.make(Sparsity(), ("*.down",)).apply(block, ARCH, None)
    assert block.linears["layers.0.up"] is up
    assert block.linears[DOWN] is not up


def test_inputs_that_make_no_fours_are_refused_by_role() -> None:
    block = given_block({DOWN: random_linear(8, 30)})
    with pytest.raises(PassError, match=r"layers\.0\.down: pattern 2:4: its 30 inputs"):
        magnitude.make(Sparsity(pattern="2:4"), ("*",)).apply(block, ARCH, None)
