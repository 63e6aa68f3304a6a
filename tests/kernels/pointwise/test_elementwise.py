"""Gated activations, factors and caps against the torch operations that define them."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from gpus import DEVICE

from tidegate.kernels import pointwise
from tidegate.kernels.pointwise import reference
from tidegate.kernels.torch_ops import activate
from tidegate.model.architecture import Activation

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
ROUNDING = {torch.float32: 3e-6, torch.float16: 1.1e-3, torch.bfloat16: 1e-2}


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    relative = ROUNDING[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=relative, atol=relative)


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    return values.to(device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_gate_is_activated_and_multiplied(act: Activation, dtype: torch.dtype) -> None:
    gate_up = drawn(3, 2 * 1100, dtype=dtype)
    found = pointwise.gated_activation(gate_up, act)
    assert found.dtype == dtype
    near(found, reference.gated_activation(gate_up, act))


def test_a_slice_is_activated_into_another() -> None:
    wide, out = drawn(4, 100, dtype=torch.float32), torch.zeros(4, 50, device=DEVICE)
    pointwise.gated_activation(wide[:, 10:50], "silu", out=out[:, 5:25])
    near(out[:, 5:25], reference.gated_activation(wide[:, 10:50], "silu"))
    assert not out[:, :5].any()
    assert not out[:, 25:].any()


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_factor_cut_and_soft_cap_come_in_this_order(dtype: torch.dtype) -> None:
    x = drawn(5, 501, dtype=dtype)
    near(pointwise.adjust(x, factor=0.3), reference.adjust(x, factor=0.3))
    near(pointwise.adjust(x, limit=1.5), reference.adjust(x, limit=1.5))
    wanted = reference.adjust(x, factor=4, limit=8, cap=5)
    near(pointwise.adjust(x, factor=4, limit=8, cap=5, out=x), wanted)


def test_a_soft_cap_is_as_exact_near_zero_as_far_from_it() -> None:
    x = torch.logspace(-9, 4, 3000, device=DEVICE)
    x = torch.cat([x, -x, torch.zeros(1, device=DEVICE)])
    exact = 30 * torch.tanh(x.double() / 30)
    torch.testing.assert_close(pointwise.adjust(x, cap=30).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_on_a_gpu_activations_are_within_a_rounding_of_float64(act: Activation) -> None:
    gate_up = drawn(300, 2 * 14336, dtype=torch.bfloat16)
    exact = activate(gate_up[:, :14336].double(), act) * gate_up[:, 14336:].double()
    found = pointwise.gated_activation(gate_up, act).double()
    torch.testing.assert_close(found, exact, rtol=2**-8, atol=1e-6)
