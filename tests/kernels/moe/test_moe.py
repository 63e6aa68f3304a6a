"""Routing and the experts' kernels give what the reference gives, token by token."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from gpus import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from packedlinears import random_packed

from tidegate.kernels.launch import Gpu
from tidegate.kernels.moe import ExpertWeights, MoeWorkspace, moe, reference, route, stack_experts
from tidegate.kernels.moe.plan import most_blocks, plan_experts
from tidegate.model.architecture import Activation
from tidegate.model.ops import GatedMlp
from tidegate.model.packed import DenseLinear, Linear

WIDTH, INNER, COUNT, CHOSEN = 48, 40, 5, 2


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def layer(*, dense: bool = False, zeros: bool = False, bits: int = 4) -> ExpertWeights:
    def one(outputs: int, inputs: int, seed: int) -> Linear:
        packed = random_packed(
            outputs, inputs, 16, bits=bits, seed=seed, symmetric=not (zeros and seed % 2)
        )
        return DenseLinear(weight=packed.dequantise()) if dense else packed

    experts = [
        GatedMlp(
            gate=one(INNER, WIDTH, 3 * number),
            up=one(INNER, WIDTH, 3 * number + 1),
            down=one(WIDTH, INNER, 3 * number + 2),
        )
        for number in range(COUNT)
    ]
    return stack_experts(experts, device=DEVICE, dtype=torch.float32)


def chosen_for(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.route(drawn(tokens, COUNT, seed=3), chosen=CHOSEN, normalised=True)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("tokens", "count", "chosen"), [(3, 5, 2), (1, 128, 8), (2, 4, 4)])
def test_routing_chooses_as_the_reference_does(
    tokens: int, count: int, chosen: int, normalised: bool
) -> None:
    logits = drawn(tokens, count).to(torch.float16)
    found = route(logits, chosen=chosen, normalised=normalised)
    expected = reference.route(logits, chosen=chosen, normalised=normalised)
    assert torch.equal(found[0], expected[0])
    assert torch.allclose(found[1], expected[1], atol=1e-6)


def test_of_equal_experts_the_first_are_chosen() -> None:
    experts, shares = route(torch.zeros(1, 6, device=DEVICE), chosen=3, normalised=True)
    assert experts.tolist() == [[0, 1, 2]]
    assert torch.allclose(shares, torch.full((1, 3), 1 / 3, device=DEVICE))


@pytest.mark.parametrize(("tokens", "deterministic"), [(1, False), (1, True), (17, False)])
@pytest.mark.parametrize(
    "weights", [layer(), layer(zeros=True), layer(bits=8, zeros=True), layer(dense=True)]
)
def test_experts_compute_as_the_reference_does(
    weights: ExpertWeights, tokens: int, deterministic: bool
) -> None:
    x = drawn(tokens, WIDTH)
    experts, shares = chosen_for(tokens)
    found = moe(x, experts, shares, weights, "silu", deterministic=deterministic)
    assert torch.allclose(found, reference.moe(x, experts, shares, weights, "silu"), atol=1e-5)


@pytest.mark.parametrize("act", get_args(Activation))
def test_every_activation_is_the_references(act: Activation) -> None:
    x, weights = 3 * drawn(2, WIDTH), layer(dense=True)
    experts, shares = chosen_for(2)
    found = moe(x, experts, shares, weights, act)
    assert torch.allclose(found, reference.moe(x, experts, shares, weights, act), atol=1e-5)


def test_a_token_alone_and_among_others_gets_the_same_numbers_in_the_fixed_order() -> None:
    x, weights = drawn(18, WIDTH), layer()
    experts, shares = chosen_for(18)
    workspace = MoeWorkspace.of(
        weights, most_tokens=18, chosen=CHOSEN, dtype=x.dtype, device=DEVICE
    )
    out = torch.empty_like(x)
    together = moe(x, experts, shares, weights, "silu", out=out, workspace=workspace)
    assert together is out
    for token in (0, 17):
        one = slice(token, token + 1)
        alone = moe(
            x[one],
            experts[one],
            shares[one],
            weights,
            "silu",
            workspace=workspace,
            deterministic=True,
        )
        assert torch.equal(alone[0], together[token])


def test_all_tokens_of_one_expert_and_none_of_the_others() -> None:
    x, weights = drawn(20, WIDTH), layer()
    experts = torch.tensor([[3, 0]], dtype=torch.int32, device=DEVICE).repeat(20, 1)
    shares = torch.full((20, 2), 0.5, device=DEVICE)
    found = moe(x, experts, shares, weights, "silu")
    assert torch.allclose(found, reference.moe(x, experts, shares, weights, "silu"), atol=1e-5)


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=40).filter(any),
    tokens=st.sampled_from([8, 16, 64]),
)
def test_there_are_blocks_enough_for_every_way_to_choose(counts: list[int], tokens: int) -> None:
    needed = sum(-(-count // tokens) for count in counts)
    assert needed <= most_blocks(sum(counts), len(counts), tokens)


def test_few_pairs_are_not_sorted_and_many_fill_wide_blocks() -> None:
    gpu = Gpu(name="NVIDIA H200", processors=132)
    one = plan_experts(pairs=8, experts=128, gpu=gpu)
    assert (one.direct, one.blocks) == (True, 8)
    many = plan_experts(pairs=8192 * 8, experts=128, gpu=gpu)
    assert (many.direct, many.tokens, many.blocks) == (False, 64, 1024 + 128)


def test_what_does_not_fit_is_refused() -> None:
    experts, shares = chosen_for(2)
    with pytest.raises(ValueError, match="x: "):
        moe(drawn(2, WIDTH + 1), experts, shares, layer(), "silu")
    with pytest.raises(ValueError, match="chosen = 6"):
        route(drawn(1, 5), chosen=6, normalised=True)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_token_that_is_not_a_number_is_routed_to_experts_that_are_there() -> None:
    logits = torch.full((2, COUNT), torch.nan, device=DEVICE)
    logits[1] = torch.arange(COUNT)
    experts, shares = route(logits, chosen=CHOSEN, normalised=True)
    assert 0 <= int(experts.min()) <= int(experts.max()) < COUNT
    assert shares[0].isnan().all()
    assert experts[1].tolist() == [COUNT - 1, COUNT - 2]
