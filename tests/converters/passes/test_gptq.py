"""GPTQ on a block: less error than rounding, order of the walk, and what happens without data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tinyblocks import TinyData, layer_block, spiky_sequences
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.passes import clip, gptq
from tidegate.converters.passes.base import Block
from tidegate.errors import ConfigError
from tidegate.model.architecture import Experts
from tidegate.model.packed import DenseLinear, LowRankLinear, PackedLinear
from tidegate.model.recipe import Format

ARCH = tiny_architecture(layers=1)
FORMAT = Format(bits=4, group_size=64)


def tiny_block(formats: Format | dict[str, Format] = FORMAT) -> tuple[Block, TinyData]:
    block = layer_block(ARCH, RandomWeights(ARCH, seed=1), 0, formats)
    return block, TinyData(block, ARCH, spiky_sequences(ARCH.width, seed=2))


def output(data: TinyData) -> torch.Tensor:
    return torch.cat(list(data.outputs()))


def test_a_block_errs_less_than_with_clipped_rounding() -> None:
    block, data = tiny_block()
    expected = output(data)
    gptq.make(gptq.Options(), ("*",)).apply(block, ARCH, data)
    assert all(isinstance(linear, PackedLinear) for linear in block.linears.values())
    assert not block.notes
    plain, plain_data = tiny_block()
    clip.make(clip.Options(), ("*",)).apply(plain, ARCH, plain_data)
    error, plain_error = (
        float((output(part) - expected).square().sum()) for part in (data, plain_data)
    )
    assert error < 0.8 * plain_error


def test_down_is_packed_for_what_the_packed_layers_before_it_give() -> None:
    block, data = tiny_block()
    down = block.linears["layers.0.down"]
    assert isinstance(down, DenseLinear)
    gptq.make(gptq.Options(), ("*",)).apply(block, ARCH, data)
    # The block holds the packed layers now, so this is the Gram matrix that down was packed for.
    again = gptq.quantise_with_gram(down, FORMAT, data.gram("layers.0.down"), 0.01)
    packed = block.linears["layers.0.down"]
    assert isinstance(packed, PackedLinear)
    assert again is not None
    assert np.array_equal(packed.values, again.values)


def test_formats_and_patterns_decide_what_is_packed() -> None:
    formats = dict.fromkeys(tiny_block()[0].linears, FORMAT)
    formats["layers.0.o"] = Format(bits=32)
    formats["layers.0.k"] = Format(bits=8, group_size=None, symmetric=True)
    block, data = tiny_block(formats)
    gptq.make(gptq.Options(), ("*.[qkvo]",)).apply(block, ARCH, data)
    found = {
        role.rsplit(".", 1)[-1]: linear.bits
        for role, linear in block.linears.items()
        if isinstance(linear, PackedLinear)
    }
    assert found == {"q": 4, "k": 8, "v": 4}


def test_an_expert_that_no_token_reached_is_noted_and_rounded() -> None:
    experts = Experts(count=8, chosen=1, inner=32, normalised=True)
    arch = replace(ARCH, kinds=(replace(ARCH.kinds[0], experts=experts),))
    block = layer_block(arch, RandomWeights(arch, seed=1), 0, FORMAT)
    data = TinyData(block, arch, spiky_sequences(arch.width, seed=2, count=1, tokens=3))
    gptq.make(gptq.Options(), ("*",)).apply(block, arch, data)
    assert all(isinstance(linear, PackedLinear) for linear in block.linears.values())
    assert 5 * 3 <= len(block.notes) < 8 * 3
    assert all("no calibration token reaches it" in note for note in block.notes.values())


class IndefiniteData(TinyData):
    """What a broken accumulation would give: no Gram matrix at all."""

    def gram(self, role: str) -> torch.Tensor:
        return -super().gram(role) + torch.ones(()) * 1e9 * torch.eye(len(super().gram(role)))[0]


def test_an_indefinite_gram_matrix_is_noted_and_rounded() -> None:
    block, _ = tiny_block()
    data = IndefiniteData(block, ARCH, spiky_sequences(ARCH.width, seed=2))
    gptq.make(gptq.Options(), ("*.q",)).apply(block, ARCH, data)
    assert isinstance(block.linears["layers.0.q"], PackedLinear)
    assert "not positive definite" in block.notes["layers.0.q"]


def test_a_low_rank_layer_is_left_and_noted() -> None:
    block, data = tiny_block()
    factors = LowRankLinear(
        first=DenseLinear(weight=np.ones((8, ARCH.width), np.float32)),
        second=DenseLinear(weight=np.ones((ARCH.width, 8), np.float32)),
    )
    block.linears["layers.0.q"] = factors
    gptq.make(gptq.Options(), ("*.q",)).apply(block, ARCH, data)
    assert block.linears["layers.0.q"] is factors
    assert "layers.0.q" in block.notes


@pytest.mark.parametrize("damping", [0.0, -1.0, 1.5, float("nan")])
def test_damping_out_of_range_is_refused(damping: float) -> None:
    with pytest.raises(ConfigError, match="damping"):
        gptq.Options(damping=damping)
