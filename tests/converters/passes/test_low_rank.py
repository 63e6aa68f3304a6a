"""Low rank: the best product there is for the inputs, never a larger one, nothing lost silently."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from giveninputs import GivenInputs, given_block, random_linear, uneven_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from tinymodel import tiny_architecture

from tidegate.converters.passes.base import Block, PassError
from tidegate.converters.passes.low_rank import Options, factorise, make
from tidegate.errors import ConfigError
from tidegate.model.packed import DenseLinear, Linear, LowRankLinear, dense_weight

UP = "layers.0.up"


def apply(block: Block, options: Options, inputs: torch.Tensor | None) -> Linear:
    data = GivenInputs({} if inputs is None else {UP: inputs})
    make(options, ("*",)).apply(block, tiny_architecture(), data)
    return block.linears[UP]


def error(original: DenseLinear, found: Linear, inputs: torch.Tensor) -> float:
    """Mean squared difference of the outputs, summed over them."""
    difference = (dense_weight(found) - original.weight).astype(np.float64)
    outputs = inputs.numpy().astype(np.float64) @ difference.T
    return float(np.square(outputs).sum() / len(inputs))


def tail(original: DenseLinear, inputs: torch.Tensor, rank: int) -> float:
    """What no product of that rank can go below: by the eigenvalues of W G W^T, without an SVD."""
    rows = inputs.numpy().astype(np.float64)
    weight = original.weight.astype(np.float64)
    values = np.linalg.eigvalsh(weight @ (rows.T @ rows / len(rows)) @ weight.T)
    return float(values[: len(values) - rank].sum())


@settings(deadline=None, max_examples=25)
@given(st.integers(4, 24), st.integers(4, 24), st.integers(1, 23), st.integers(0, 2**32 - 1))
def test_the_error_is_the_tail_of_the_whitened_singular_values(
    outputs: int, inputs: int, rank: int, seed: int
) -> None:
    rank = min(rank, outputs, inputs)
    linear, rows = random_linear(outputs, inputs, seed=seed), uneven_inputs(inputs, seed=seed)
    gram = rows.T @ rows / len(rows)
    found = factorise(linear, gram, Options(rank=rank))
    assert found.first.outputs == rank
    total = error(linear, DenseLinear(weight=np.zeros_like(linear.weight)), rows)
    # The ridge and the float32 factors cost a little.
    assert error(linear, found, rows) == pytest.approx(tail(linear, rows, rank), abs=1e-4 * total)


def test_it_errs_less_than_the_svd_of_the_weight_alone() -> None:
    linear, inputs = random_linear(64, 96), uneven_inputs(96)
    left, values, right = np.linalg.svd(linear.weight, full_matrices=False)
    plain = DenseLinear(weight=(left[:, :16] * values[:16]) @ right[:16])
    found = apply(given_block({UP: linear}), Options(rank=16), inputs)
    assert error(linear, found, inputs) < 0.7 * error(linear, plain, inputs)


def test_the_bias_stays_with_the_second_factor() -> None:
    linear = random_linear(64, 96, bias=True)
    found = apply(given_block({UP: linear}), Options(rank=16), uneven_inputs(96))
    assert isinstance(found, LowRankLinear)
    assert found.bias is linear.bias
    assert found.first.weight.shape == (16, 96)  # type: ignore[union-attr]
    assert found.second.weight.shape == (64, 16)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        (Options(), 32),  # 0.5 * 128 * 192 / 320 = 38.4
        (Options(ratio=0.9, multiple=8), 64),  # 69.1
        (Options(ratio=0.01), 1),
        (Options(rank=37), 37),
    ],
)
def test_a_ratio_is_rounded_down_to_whole_groups_and_a_rank_is_taken_as_it_is(
    options: Options, rank: int
) -> None:
    found = apply(given_block({UP: random_linear(128, 192)}), options, uneven_inputs(192))
    assert isinstance(found, LowRankLinear)
    assert found.first.outputs == rank


def test_energy_keeps_at_least_that_share_of_the_output() -> None:
    linear, inputs = random_linear(128, 192), uneven_inputs(192)
    found = apply(given_block({UP: linear}), Options(energy=0.8, multiple=1), inputs)
    assert isinstance(found, LowRankLinear)
    total = error(linear, DenseLinear(weight=np.zeros_like(linear.weight)), inputs)
    assert error(linear, found, inputs) <= 0.2 * total
    assert tail(linear, inputs, found.first.outputs - 1) > 0.2 * total


def test_a_rank_that_would_not_make_it_smaller_is_left_and_noted() -> None:
    linear = random_linear(32, 32)
    block = given_block({UP: linear})
    assert apply(block, Options(rank=16), uneven_inputs(32)) is linear
    assert "rank 16 would not make it smaller" in block.notes[UP]
    assert isinstance(apply(block, Options(rank=15), uneven_inputs(32)), LowRankLinear)


def test_what_no_token_reached_is_left_and_noted() -> None:
    linear = random_linear(64, 96)
    block = given_block({UP: linear})
    assert apply(block, Options(rank=4), None) is linear
    assert "no token reached" in block.notes[UP]


def test_inputs_that_were_never_used_are_no_obstacle() -> None:
    linear, inputs = random_linear(64, 96), uneven_inputs(96)
    inputs[:, 40:] = 0
    found = apply(given_block({UP: linear}), Options(rank=40 - 8), inputs)
    assert error(linear, found, inputs) < error(
        linear, DenseLinear(weight=np.zeros_like(linear.weight)), inputs
    )


def test_fewer_tokens_than_inputs_are_no_obstacle() -> None:
    linear, inputs = random_linear(64, 96), uneven_inputs(96, tokens=20).repeat(30, 1)
    found = apply(given_block({UP: linear}), Options(rank=20), inputs)
    total = error(linear, DenseLinear(weight=np.zeros_like(linear.weight)), inputs)
    assert error(linear, found, inputs) < 1e-3 * total


def test_infinite_inputs_are_refused_by_role() -> None:
    inputs = uneven_inputs(96)
    inputs[0, 0] = torch.inf
    with pytest.raises(PassError, match=r"layers\.0\.up: the inputs' second moment"):
        apply(given_block({UP: random_linear(64, 96)}), Options(rank=4), inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "ratio": 0.5}, "rank and ratio"),
        ({"rank": -1}, r"rank = -1: must be at least 1"),
        ({"ratio": 1.0}, "ratio"),
        ({"energy": -0.5}, "energy"),
        ({"multiple": 0}, "multiple"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(**options)  # type: ignore[arg-type]
