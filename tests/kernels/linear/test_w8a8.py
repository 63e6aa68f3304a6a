"""8-bit activations with 8-bit weights: rounded, multiplied and scaled as the reference does."""

from __future__ import annotations

import pytest
import torch
from gpus import DEVICE
from packedlinears import random_packed

from tidegate.errors import ConfigError
from tidegate.kernels.launch import gpu_of
from tidegate.kernels.linear import Int8Linear, LinearWorkspace, int8_linear, w8a8_linear
from tidegate.kernels.linear.int8 import reference_quantise, reference_w8a8
from tidegate.kernels.linear.plan import plan_product


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def layer(
    outputs: int, inputs: int, group: int, *, symmetric: bool = True, bias: bool = False
) -> Int8Linear:
    return int8_linear(
        random_packed(outputs, inputs, group, bits=8, symmetric=symmetric, bias=bias),
        device=DEVICE,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group", "symmetric", "bias", "tokens"),
    [
        (70, 200, 64, True, True, 3),
        (64, 96, 32, False, False, 17),
        (130, 50, 50, False, True, 1),
        (65, 384, 128, True, False, 9),
        (5, 20, 20, True, False, 2),
    ],
)
def test_the_product_is_the_references(
    outputs: int,
    inputs: int,
    group: int,
    symmetric: bool,
    bias: bool,
    tokens: int,
    dtype: torch.dtype,
) -> None:
    weight = layer(outputs, inputs, group, symmetric=symmetric, bias=bias)
    x = drawn(tokens, inputs).to(dtype)
    found, expected = w8a8_linear(x, weight), reference_w8a8(x, weight)
    assert found.dtype == dtype
    assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 2e-3)


def test_the_reference_is_near_the_product_of_what_was_rounded() -> None:
    packed = random_packed(40, 200, 64, bits=8, symmetric=False, bias=True)
    x = drawn(30, 200)
    exact = x.cpu() @ torch.from_numpy(packed.dequantise()).T + torch.from_numpy(packed.bias)
    found = reference_w8a8(x.cpu(), int8_linear(packed))
    # A token's largest of 200 normal numbers is near 3, so inputs are off by 3 / 254 at most.
    assert (found - exact).abs().max() < 0.03 * exact.std()


def test_activations_are_rounded_half_to_even_and_a_row_of_zeros_stays() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]], device=DEVICE)
    rows, scales = reference_quantise(x, 6)
    assert rows.tolist() == [[127, 0, 2, -2, 0, 0], [0] * 6]
    assert scales[0] == 1
    weight = layer(64, 4, 4)
    assert torch.equal(w8a8_linear(x, weight)[1], torch.zeros(64, device=DEVICE))
    assert torch.allclose(w8a8_linear(x, weight), reference_w8a8(x, weight), atol=1e-4)


def test_a_token_alone_and_among_others_gets_the_same_numbers_in_the_fixed_order() -> None:
    weight, x = layer(64, 1200, 32), drawn(20, 1200)
    assert plan_product(weight, 1, gpu_of(x.device), deterministic=True).splits > 1
    workspace = LinearWorkspace.of(
        [weight], most_tokens=20, dtype=x.dtype, device=DEVICE, deterministic=True
    )
    out = torch.empty(20, 64, device=DEVICE)
    together = w8a8_linear(x, weight, out=out, deterministic=True, workspace=workspace)
    assert together is out
    assert not workspace.arrived.any()
    for token in (0, 19):
        one = x[token : token + 1]
        alone = w8a8_linear(one, weight, deterministic=True, workspace=workspace)
        assert torch.equal(alone[0], together[token])


def test_layers_that_it_cannot_read_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="bits = 4"):
        int8_linear(random_packed(8, 64, 32))
    with pytest.raises(ConfigError, match="group_size = 16"):
        int8_linear(random_packed(8, 64, 16, bits=8))
    with pytest.raises(ValueError, match=r"x: \(1, 63\)"):
        w8a8_linear(drawn(1, 63), layer(8, 64, 32))
