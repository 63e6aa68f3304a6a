"""bfloat16 products of real sizes against float64, and the fixed order at real sizes."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from gpus import DEVICE
from packedlinears import random_packed

from tidegate.kernels.linear import DenseWeight, LinearWorkspace, apply_linear, dequantise, retile
from tidegate.kernels.linear.reference import weight_matrix
from tidegate.kernels.linear.weights import TiledLinear

pytestmark = pytest.mark.gpu

ROUNDING = 2**-8
"""Of bfloat16, relative; sums of thousands in float32 add far less."""


@cache
def layer(
    outputs: int, inputs: int, group: int, *, bits: int = 4, symmetric: bool = True
) -> TiledLinear:
    packed = random_packed(outputs, inputs, group, bits=bits, symmetric=symmetric)
    return retile([packed], device=DEVICE)


def drawn(tokens: int, inputs: int) -> torch.Tensor:
    draw = torch.Generator(DEVICE).manual_seed(tokens)
    return torch.randn(tokens, inputs, device=DEVICE, generator=draw).bfloat16()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 16, 33, 64, 200, 1000])
@pytest.mark.parametrize(
    ("outputs", "inputs", "bits", "group", "symmetric"),
    [
        (4096, 4096, 4, 128, True),
        (14336, 4096, 4, 64, False),
        (4096, 14336, 4, 32, True),
        (1000, 2048, 8, 128, False),
    ],
)
def test_products_are_those_of_float64(
    outputs: int,
    inputs: int,
    bits: int,
    group: int,
    symmetric: bool,
    tokens: int,
    deterministic: bool,
) -> None:
    weight = layer(outputs, inputs, group, bits=bits, symmetric=symmetric)
    x = drawn(tokens, inputs)
    exact = x.double() @ weight_matrix(weight).double().T
    found = apply_linear(x, weight, deterministic=deterministic)
    # Weights that are written out are rounded themselves.
    allowed = 2 * ROUNDING * exact.abs().max()
    assert (found.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("tiled", [True, False])
def test_a_row_has_the_same_bits_in_every_step_when_the_order_is_fixed(tiled: bool) -> None:
    tiles = layer(4096, 4096, 128)
    dense = DenseWeight(weight=dequantise(tiles, torch.bfloat16))
    weight = tiles if tiled else dense
    workspace = LinearWorkspace.of(
        [weight], most_tokens=2048, dtype=torch.bfloat16, device=DEVICE, deterministic=True
    )
    x = drawn(2048, 4096)
    row = x[:1].clone()
    alone = apply_linear(row, weight, deterministic=True, workspace=workspace)
    for tokens in (2, 8, 9, 16, 17, 32, 33, 64, 65, 200, 2048):
        together = apply_linear(x[:tokens], weight, deterministic=True, workspace=workspace)
        assert torch.equal(together[0], alone[0]), tokens


def test_a_product_is_the_same_every_time_it_is_replayed() -> None:
    weight, x = layer(4096, 4096, 128), drawn(16, 4096)
    workspace = LinearWorkspace.of([weight], most_tokens=16, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty(16, 4096, dtype=torch.bfloat16, device=DEVICE)
    first = apply_linear(x, weight, out=out, workspace=workspace).clone()
    for _ in range(200):
        apply_linear(x, weight, out=out, workspace=workspace)
        assert torch.equal(out, first)
    assert not workspace.arrived.any()
