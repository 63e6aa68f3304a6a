"""The experts' definition in two parts gives what the walk's plain operation gives in one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from packedlinears import random_packed

from tidegate.errors import ConversionError
from tidegate.kernels.moe.reference import moe, route
from tidegate.kernels.moe.weights import stack_experts
from tidegate.kernels.torch_ops import TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model.architecture import Experts
from tidegate.model.ops import GatedMlp
from tidegate.model.packed import DenseLinear, Linear, dense_weight

WIDTH, INNER, COUNT = 48, 40, 5


def packed_expert(number: int) -> GatedMlp:
    return GatedMlp(
        gate=random_packed(INNER, WIDTH, 16, seed=3 * number),
        up=random_packed(INNER, WIDTH, 16, seed=3 * number + 1, symmetric=number % 2 == 0),
        down=random_packed(WIDTH, INNER, 32, seed=3 * number + 2),
    )


def widened(linear: Linear) -> Linear:
    return DenseLinear(weight=dense_weight(linear))


def dense_expert(number: int) -> GatedMlp:
    packed = packed_expert(number)
    return GatedMlp(gate=widened(packed.gate), up=widened(packed.up), down=widened(packed.down))


@pytest.mark.parametrize("expert", [packed_expert, dense_expert])
@pytest.mark.parametrize("normalised", [True, False])
def test_routing_and_experts_are_the_plain_operation(
    expert: Callable[[int], GatedMlp], normalised: bool
) -> None:
    experts = Experts(count=COUNT, chosen=2, inner=INNER, normalised=normalised)
    router = DenseLinear(weight=np.random.default_rng(9).normal(size=(COUNT, WIDTH)).astype("f4"))
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))
    kv = TorchKv.allocate(layers=1, slots=1, tokens=1, kv_heads=1, head_size=2)
    expected = TorchOps([TorchRow(tokens=(0,), past=0, slot=0)], kv, WeightTensors()).moe(
        x, router, expert, experts, "silu"
    )
    chosen, shares = route(x @ torch.from_numpy(router.weight).T, chosen=2, normalised=normalised)
    weights = stack_experts([expert(e) for e in range(COUNT)], device="cpu", dtype=torch.float32)
    assert torch.allclose(moe(x, chosen, shares, weights, "silu"), expected, atol=1e-5)


def test_experts_packed_in_different_ways_are_refused() -> None:
    mixed = [packed_expert(0), dense_expert(1)]
    with pytest.raises(ConversionError, match="packed in the same way"):
        stack_experts(mixed, device="cpu", dtype=torch.float32)
