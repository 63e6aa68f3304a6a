"""SmoothQuant on a block: the same model, and less error from int8 activations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tinyblocks import TinyData, layer_block, spiky_sequences
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.passes import smooth
from tidegate.converters.rounding.block_packing import nearest
from tidegate.errors import ConfigError
from tidegate.model.packed import DenseLinear
from tidegate.model.recipe import Format

ARCH = tiny_architecture(layers=1)
FORMAT = Format(bits=8, group_size=None, symmetric=True)


def int8_error(linear: DenseLinear, rows: torch.Tensor) -> float:
    """Mean square error of the outputs with int8 weights and int8 rows, relative to the outputs."""
    exact = rows @ torch.from_numpy(linear.weight).T
    scales = rows.abs().amax(dim=1, keepdim=True) / 127
    rounded = (rows / scales).round() * scales
    packed = torch.from_numpy(nearest(linear, FORMAT).dequantise())
    return float((rounded @ packed.T - exact).square().mean() / exact.square().mean())


def test_outlier_channels_cost_less_and_the_float_model_says_the_same() -> None:
    block = layer_block(ARCH, RandomWeights(ARCH, seed=1), 0, FORMAT)
    for norm in ("attention_norm", "mlp_norm"):
        block.vectors[f"layers.0.{norm}"][[5, 40]] = 60  # a few channels far larger than the rest
    data = TinyData(block, ARCH, spiky_sequences(ARCH.width, seed=2))
    expected = torch.cat(list(data.outputs()))
    roles = ("layers.0.q", "layers.0.gate")

    def errors() -> list[float]:
        found = []
        for role in roles:
            linear = block.linears[role]
            assert isinstance(linear, DenseLinear)
            found.append(int8_error(linear, data.rows(role)))
        return found

    before = errors()
    smooth.make(smooth.Options(), ("*",)).apply(block, ARCH, data)
    after = errors()
    assert all(new < 0.5 * old for new, old in zip(after, before, strict=True))
    torch.testing.assert_close(
        torch.cat(list(data.outputs())), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def test_with_an_alpha_of_one_every_input_has_the_same_peak() -> None:
    block = layer_block(ARCH, RandomWeights(ARCH, seed=1), 0, FORMAT)
    data = TinyData(block, ARCH, spiky_sequences(ARCH.width, seed=2))
    smooth.make(smooth.Options(alpha=1.0), ("*.q",)).apply(block, ARCH, data)
    np.testing.assert_allclose(data.peak("layers.0.q").numpy(), 1, rtol=1e-4)


def test_an_input_that_is_always_zero_is_left_alone() -> None:
    block = layer_block(ARCH, RandomWeights(ARCH, seed=1), 0, FORMAT)
    block.vectors["layers.0.attention_norm"][3] = 0
    data = TinyData(block, ARCH, spiky_sequences(ARCH.width, seed=2))
    before = block.linears["layers.0.q"]
    smooth.make(smooth.Options(), ("*",)).apply(block, ARCH, data)
    after = block.linears["layers.0.q"]
    assert isinstance(before, DenseLinear)
    assert isinstance(after, DenseLinear)
    assert np.array_equal(after.weight[:, 3], before.weight[:, 3])
    assert np.isfinite(after.weight).all()


def test_what_cannot_be_smoothed_is_noted() -> None:
    arch = replace(ARCH, norm_before=False, norm_after=True)
    block = layer_block(arch, RandomWeights(arch, seed=1), 0, FORMAT)
    data = TinyData(block, arch, spiky_sequences(arch.width, seed=2))
    smooth.make(smooth.Options(), ("*",)).apply(block, arch, data)
    assert set(block.notes) == {f"layers.0.{part}" for part in ("q", "k", "v", "gate", "up")}


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        smooth.Options(alpha=alpha)
