"""Scale estimation: exact least squares, and never worse than what it starts from."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tinyblocks import TinyData, layer_block, spiky_sequences
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.passes import awq, clip, scale_estimation
from tidegate.converters.passes.gptq import quantise_with_gram
from tidegate.converters.passes.scale_estimation import best_scales, refine
from tidegate.converters.rounding.block_packing import nearest
from tidegate.converters.rounding.feedback import factorise, row_errors
from tidegate.errors import ConfigError
from tidegate.model.packed import Bits, DenseLinear, PackedLinear
from tidegate.model.recipe import Format, GroupSize

ARCH = tiny_architecture(layers=1)


def random_case(outputs: int, inputs: int, seed: int) -> tuple[DenseLinear, torch.Tensor]:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((2 * inputs, inputs)) @ rng.standard_normal((inputs, inputs))
    gram = torch.from_numpy((rows.T @ rows / len(rows)).astype(np.float32))
    weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
    return DenseLinear(weight=weight), gram


def by_least_squares(weight: np.ndarray, linear: PackedLinear, gram: np.ndarray) -> np.ndarray:
    """The definition: rows that have the Gram matrix, and numpy's least squares per output."""
    root = np.linalg.cholesky(gram.astype(np.float64)).T
    zeros = linear.symmetric_zero if linear.zeros is None else linear.zeros[..., None]
    units = linear.integers().astype(np.float64) - zeros
    scales = np.empty(linear.scales.shape)
    for row in range(linear.outputs):
        columns = np.zeros((linear.groups, linear.groups * linear.group_size))
        for group in range(linear.groups):
            start = group * linear.group_size
            columns[group, start : start + linear.group_size] = units[row, group]
        inputs = root @ columns[:, : linear.inputs].T
        scales[row] = np.linalg.lstsq(inputs, root @ weight[row], rcond=None)[0]
    return scales


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("inputs", [64, 100])
def test_scales_are_those_of_least_squares(symmetric: bool, inputs: int) -> None:
    layer, gram = random_case(8, inputs, seed=inputs)
    linear = nearest(layer, Format(bits=4, group_size=32, symmetric=symmetric))
    found = best_scales(torch.from_numpy(layer.weight) @ gram, linear, gram)
    expected = by_least_squares(layer.weight, linear, gram.numpy())
    assert not np.allclose(linear.scales, expected, rtol=1e-3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3)


@settings(deadline=None, max_examples=30)
@given(
    outputs=st.integers(1, 8),
    inputs=st.integers(1, 70).map(lambda half: 2 * half),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, None]),
    symmetric=st.booleans(),
    feeds=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_row_is_worse_than_what_it_starts_from(
    outputs: int,
    inputs: int,
    bits: Bits,
    group_size: GroupSize | None,
    symmetric: bool,
    feeds: bool,
    seed: int,
) -> None:
    layer, gram = random_case(outputs, inputs, seed)
    wanted = Format(bits=bits, group_size=group_size, symmetric=symmetric)
    feedback = factorise(gram, 0.01) if feeds else None
    found = refine(layer, wanted, gram, feedback, 3)
    start = nearest(layer, wanted, gram.diagonal().numpy())
    if feeds:
        fed = quantise_with_gram(layer, wanted, gram, 0.01)
        assert fed is not None
        start = fed
    weight = torch.from_numpy(layer.weight)
    errors, starts = (row_errors(weight, part, gram) for part in (found, start))
    assert bool((errors <= starts * (1 + 1e-4) + 1e-9).all())
    assert np.array_equal(found.scales, found.scales.astype(np.float16))
    assert (found.scales > 0).all()


@pytest.mark.parametrize("rounding", ["feedback", "nearest"])
def test_turns_lower_the_error_of_a_block(rounding: Literal["feedback", "nearest"]) -> None:
    errors = []
    for iterations in (1, 6):
        layer, gram = random_case(32, 128, seed=5)
        feedback = factorise(gram, 0.01) if rounding == "feedback" else None
        packed = refine(layer, Format(group_size=64), gram, feedback, iterations)
        errors.append(float(row_errors(torch.from_numpy(layer.weight), packed, gram).sum()))
    start = nearest(layer, Format(group_size=64), gram.diagonal().numpy())
    plain = float(row_errors(torch.from_numpy(layer.weight), start, gram).sum())
    assert errors[1] <= errors[0] < plain


@pytest.mark.parametrize("rounding", ["feedback", "nearest"])
def test_it_packs_a_block_that_awq_has_scaled(rounding: Literal["feedback", "nearest"]) -> None:
    options = scale_estimation.Options(rounding=rounding, iterations=2)
    packers = (scale_estimation.make(options, ("*",)), clip.make(clip.Options(), ("*",)))
    errors = []
    for packer in packers:
        block = layer_block(ARCH, RandomWeights(ARCH, seed=1), 0, Format(group_size=64))
        data = TinyData(block, ARCH, spiky_sequences(ARCH.width, seed=2))
        expected = torch.cat(list(data.outputs()))
        awq.make(awq.Options(steps=4), ("*",)).apply(block, ARCH, data)
        packer.apply(block, ARCH, data)
        assert all(isinstance(linear, PackedLinear) for linear in block.linears.values())
        errors.append(float((torch.cat(list(data.outputs())) - expected).square().mean()))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"rounding": "up"}, {"damping": 0.0}])
def test_options_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        scale_estimation.Options(**wrong)  # type: ignore[arg-type]
