"""Experts of a real layer in bfloat16 against float64, alone and among other tokens."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from gpus import DEVICE
from packedlinears import random_packed

from tidegate.kernels.moe import ExpertWeights, moe, reference, route, stack_experts
from tidegate.model.ops import GatedMlp
from tidegate.model.packed import DenseLinear, Linear

pytestmark = pytest.mark.gpu

WIDTH, INNER, COUNT, CHOSEN = 2048, 768, 32, 8
ROUNDING = 2**-8
"""Of bfloat16, relative."""


@cache
def layer(dense: bool) -> ExpertWeights:
    def one(outputs: int, inputs: int, seed: int) -> Linear:
        packed = random_packed(outputs, inputs, 128, seed=seed)
        return DenseLinear(weight=packed.dequantise()) if dense else packed

    experts = [
        GatedMlp(
            gate=one(INNER, WIDTH, 3 * number),
            up=one(INNER, WIDTH, 3 * number + 1),
            down=one(WIDTH, INNER, 3 * number + 2),
        )
        for number in range(COUNT)
    ]
    return stack_experts(experts, device=DEVICE, dtype=torch.bfloat16)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 40, 700])
def test_experts_are_those_of_the_reference(tokens: int, dense: bool, deterministic: bool) -> None:
    draw = torch.Generator(DEVICE).manual_seed(tokens)
    x = torch.randn(tokens, WIDTH, device=DEVICE, generator=draw).bfloat16()
    logits = torch.randn(tokens, COUNT, device=DEVICE, generator=draw)
    experts, shares = route(logits, chosen=CHOSEN, normalised=True)
    expected = reference.route(logits, chosen=CHOSEN, normalised=True)
    assert torch.equal(experts, expected[0])
    found = moe(x, experts, shares, layer(dense), "silu", deterministic=deterministic)
    exact = reference.moe(x.float(), experts, shares, layer(dense), "silu")
    # Rounded between gate-up and down, after down, and at the end.
    assert (found.float() - exact).abs().max() <= 4 * ROUNDING * exact.abs().max()
    if deterministic:
        alone = moe(x[:1], experts[:1], shares[:1], layer(dense), "silu", deterministic=True)
        assert torch.equal(alone[0], found[0])
