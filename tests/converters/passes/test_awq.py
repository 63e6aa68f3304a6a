"""AWQ on a block: the same model, and less error once it is rounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tinyblocks import TinyData, layer_block, spiky_sequences
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.passes import awq, clip
from tidegate.converters.passes.base import Block
from tidegate.errors import ConfigError
from tidegate.model.architecture import Architecture, Experts
from tidegate.model.packed import DenseLinear
from tidegate.model.recipe import Format

ARCH = tiny_architecture(layers=1)
EXPERTS = replace(
    ARCH,
    kinds=(replace(ARCH.kinds[0], experts=Experts(count=4, chosen=2, inner=64, normalised=True)),),
)
FORMAT = Format(bits=4, group_size=32)


def tiny_block(arch: Architecture, seed: int = 1) -> tuple[Block, TinyData]:
    block = layer_block(arch, RandomWeights(arch, seed=seed), 0, FORMAT)
    return block, TinyData(block, arch, spiky_sequences(arch.width, seed=2))


def output(data: TinyData) -> torch.Tensor:
    return torch.cat(list(data.outputs()))


@pytest.mark.parametrize("arch", [ARCH, EXPERTS, replace(ARCH, qkv_bias=True, mlp_bias=True)])
def test_the_float_model_says_the_same_and_the_rounded_one_errs_less(arch: Architecture) -> None:
    block, data = tiny_block(arch)
    expected = output(data)
    awq.make(awq.Options(steps=10), ("*",)).apply(block, arch, data)
    assert all(isinstance(linear, DenseLinear) for linear in block.linears.values())
    torch.testing.assert_close(
        output(data), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )
    plain, plain_data = tiny_block(arch)
    for part, its_data in ((block, data), (plain, plain_data)):
        clip.make(clip.Options(weighted=False), ("*",)).apply(part, arch, its_data)
    error, plain_error = (
        float((output(part) - expected).square().sum()) for part in (data, plain_data)
    )
    assert error < 0.9 * plain_error


def test_scales_are_searched_for_what_will_be_packed_and_left_when_none_helps() -> None:
    block, data = tiny_block(ARCH)
    before = dict(block.linears)
    awq.make(awq.Options(steps=4), ("*.o",)).apply(block, ARCH, data)
    changed = {role for role, linear in block.linears.items() if linear is not before[role]}
    assert changed <= {"layers.0.o", "layers.0.v"}
    even = [torch.ones(8, ARCH.width)]
    block.formats = dict.fromkeys(block.linears, Format(bits=8, group_size=32))
    flat = TinyData(block, ARCH, even)
    block.vectors["layers.0.attention_norm"][:] = 1
    again = dict(block.linears)
    awq.make(awq.Options(steps=4), ("*.[qkv]",)).apply(block, ARCH, flat)
    # Inputs that are all alike have scales of 1 for every power, which beat nothing.
    assert block.linears == again


def test_a_model_without_norms_before_is_noted() -> None:
    arch = replace(ARCH, norm_before=False, norm_after=True)
    block, data = tiny_block(arch)
    awq.make(awq.Options(steps=4), ("*",)).apply(block, arch, data)
    assert "no norm stands before it" in block.notes["layers.0.gate"]


def test_an_expert_that_no_token_reached_is_noted() -> None:
    block = layer_block(EXPERTS, RandomWeights(EXPERTS, seed=1), 0, FORMAT)
    data = TinyData(block, EXPERTS, spiky_sequences(EXPERTS.width, seed=2, count=1, tokens=1))
    before = dict(block.linears)
    awq.make(awq.Options(steps=4), ("*.down",)).apply(block, EXPERTS, data)
    unreached = [role for role in block.notes if role.endswith("down")]
    assert len(unreached) == 2
    assert all(block.linears[role] is before[role] for role in unreached)


@pytest.mark.parametrize("steps", [0, 101])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match="steps"):
        awq.Options(steps=steps)
