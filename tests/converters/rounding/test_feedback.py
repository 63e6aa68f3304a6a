"""Rounding with feedback: GPTQ's integers, and never a worse row than rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.converters.passes.gptq import quantise_with_gram
from tidegate.converters.rounding.block_packing import nearest
from tidegate.converters.rounding.feedback import (
    better_rows,
    column_grid,
    factorise,
    round_with_feedback,
    row_errors,
    with_integers,
)
from tidegate.model.packed import Array, Bits, DenseLinear, PackedLinear
from tidegate.model.recipe import Format

Tensor = torch.Tensor


def one_by_one(weight: Tensor, start: PackedLinear, gram: Tensor, damping: float) -> Tensor:
    """The definition, in float64: GPTQ's own loop over the inverse, one column at a time."""
    scales, centres = (part.double() for part in column_grid(start))
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    damped = gram.double()[order][:, order]
    damped += torch.eye(len(damped)) * float(gram.diagonal().double().mean()) * damping
    inverse = torch.linalg.inv(damped)
    left = weight.double()[:, order]
    integers = torch.zeros_like(left)
    for k in range(left.shape[1]):
        scale, centre = scales[:, order[k]], centres[:, order[k]]
        integer = (left[:, k] / scale).round().add(centre).clamp(0, (1 << start.bits) - 1)
        integers[:, order[k]] = integer
        error = (left[:, k] - (integer - centre) * scale) / inverse[k, k]
        left -= error[:, None] * inverse[k]
        inverse -= inverse[:, k, None] * inverse[k] / inverse[k, k]
    return integers


def random_gram(inputs: int, *, rank: int, spread: float, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((rank, inputs)) @ rng.standard_normal((inputs, inputs))
    rows *= rng.lognormal(0, spread, inputs)
    return torch.from_numpy((rows.T @ rows / rank).astype(np.float32))


def random_layer(outputs: int, inputs: int, *, seed: int) -> DenseLinear:
    rng = np.random.default_rng(seed)
    return DenseLinear(weight=rng.standard_normal((outputs, inputs)).astype(np.float32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("inputs", [64, 130, 300])
def test_blocks_round_as_gptq_does_column_by_column(
    bits: Bits, symmetric: bool, inputs: int
) -> None:
    layer = random_layer(24, inputs, seed=inputs)
    gram = random_gram(inputs, rank=2 * inputs, spread=0.7, seed=1)
    start = nearest(layer, Format(bits=bits, group_size=32, symmetric=symmetric))
    feedback = factorise(gram, 0.01)
    assert feedback is not None
    weight = torch.from_numpy(layer.weight)
    found = round_with_feedback(weight, start, feedback).reshape(24, -1)[:, :inputs]
    expected = one_by_one(weight, start, gram, 0.01).numpy()
    # A value half-way between two integers may fall to either, and takes its row's rest along.
    rows_alike = (found == expected).all(axis=1)
    assert rows_alike.mean() >= (0.9 if bits == 4 else 0.7)
    assert not np.array_equal(found, start.integers().reshape(24, -1)[:, :inputs])


@settings(deadline=None, max_examples=60)
@given(
    outputs=st.integers(1, 12),
    inputs=st.integers(1, 80).map(lambda half: 2 * half),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, 128, None]),
    symmetric=st.booleans(),
    rank_share=st.floats(0.1, 3),
    spread=st.floats(0, 2),
    dead_share=st.floats(0, 0.5),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_row_is_worse_than_rounded_to_nearest_on_the_same_grid(
    outputs: int,
    inputs: int,
    bits: Bits,
    group_size: None,
    symmetric: bool,
    rank_share: float,
    spread: float,
    dead_share: float,
    seed: int,
) -> None:
    layer = random_layer(outputs, inputs, seed=seed)
    gram = random_gram(inputs, rank=max(int(inputs * rank_share), 1), spread=spread, seed=seed)
    dead = torch.from_numpy(np.random.default_rng(seed).random(inputs) < dead_share)
    gram[dead], gram[:, dead] = 0, 0
    wanted = Format(bits=bits, group_size=group_size, symmetric=symmetric)
    start = nearest(layer, wanted, gram.diagonal().numpy())
    packed = quantise_with_gram(layer, wanted, gram, 0.01)
    assert packed is not None
    assert np.array_equal(packed.scales, start.scales)
    weight = torch.from_numpy(layer.weight)
    errors, starts = (row_errors(weight, part, gram) for part in (packed, start))
    assert bool((errors <= starts * (1 + 1e-5) + 1e-9).all())
    assert np.array_equal(padding(packed), padding(start))


def padding(linear: PackedLinear) -> Array:
    """What the padded columns stand for; must be nothing."""
    whole = PackedLinear(
        values=linear.values,
        scales=linear.scales,
        zeros=linear.zeros,
        inputs=linear.groups * linear.group_size,
        bits=linear.bits,
        group_size=linear.group_size,
    )
    return whole.dequantise()[:, linear.inputs :]


def test_correlated_inputs_lose_far_less_with_feedback() -> None:
    layer = random_layer(64, 128, seed=0)
    gram = random_gram(128, rank=40, spread=0.5, seed=1)
    wanted = Format(bits=4, group_size=64)
    weight = torch.from_numpy(layer.weight)
    packed = quantise_with_gram(layer, wanted, gram, 0.01)
    assert packed is not None
    plain = nearest(layer, wanted, gram.diagonal().numpy())
    assert row_errors(weight, packed, gram).sum() < 0.5 * row_errors(weight, plain, gram).sum()


def test_dead_inputs_are_rounded_to_nearest_and_change_nothing_else() -> None:
    layer = random_layer(16, 96, seed=0)
    gram = random_gram(96, rank=200, spread=0.5, seed=1)
    gram[:, 10], gram[10] = 0, 0
    start = nearest(layer, Format(bits=4, group_size=32))
    feedback = factorise(gram, 0.01)
    assert feedback is not None
    weight = torch.from_numpy(layer.weight)
    integers = round_with_feedback(weight, start, feedback).reshape(16, -1)
    assert np.array_equal(integers[:, 10], start.integers().reshape(16, -1)[:, 10])
    moved = weight.clone()
    moved[:, 10] = 0
    others = round_with_feedback(moved, start, feedback).reshape(16, -1)
    assert np.array_equal(np.delete(integers, 10, 1), np.delete(others, 10, 1))


def test_a_matrix_that_no_damping_makes_definite_has_no_feedback() -> None:
    gram = random_gram(64, rank=128, spread=0, seed=0)
    indefinite = gram.clone()
    indefinite[0, 1] = indefinite[1, 0] = 1e9
    assert factorise(indefinite, 0.01) is None
    assert factorise(torch.full((4, 4), torch.nan), 0.01) is None
    slightly = gram - torch.eye(64) * torch.linalg.eigvalsh(gram)[0] * 3
    assert factorise(slightly, 1e-4) is not None, "raised damping makes it definite"


def test_each_row_comes_from_the_one_that_errs_less() -> None:
    layer = random_layer(6, 32, seed=0)
    weight, gram = torch.from_numpy(layer.weight), torch.eye(32)
    good = nearest(layer, Format(bits=4, group_size=32))
    integers = good.integers().copy()
    integers[::2] = 0
    half_bad = with_integers(good, integers)
    integers = good.integers().copy()
    integers[1::2] = 15
    other_bad = with_integers(good, integers)
    best = better_rows(weight, gram, half_bad, other_bad)
    assert np.array_equal(best.values, good.values)
