"""The norm's kernels against the torch operations that define them."""

from __future__ import annotations

import pytest
import torch
from gpus import DEVICE

from tidegate.kernels import pointwise
from tidegate.kernels.pointwise import reference


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for the order of float32 sums and one rounding; to bf16 the interpreter cuts."""
    relative = {torch.float32: 2e-6, torch.float16: 1.1e-3, torch.bfloat16: 2e-2}[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=relative, atol=relative * 1e-2)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 64, 100, 1536])
def test_a_row_has_the_norm_that_the_reference_gives(size: int, dtype: torch.dtype) -> None:
    x, weight = drawn(7, size, dtype=dtype), drawn(size, dtype=dtype, seed=1)
    normed, stream = pointwise.rms_norm(x, weight, 1e-5)
    assert stream is x
    assert normed.dtype == dtype
    near(normed, reference.rms_norm(x, weight, 1e-5)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [96, 20000])
def test_the_residual_sum_is_taken_first_and_kept(size: int, dtype: torch.dtype) -> None:
    x, weight = drawn(3, size, dtype=dtype), drawn(size, seed=1)
    before = drawn(3, size, dtype=dtype, seed=2)
    mine, theirs = before.clone(), before.clone()
    normed, stream = pointwise.rms_norm(x, weight, 1e-6, residual=mine)
    assert stream is mine
    near(normed, reference.rms_norm(x, weight, 1e-6, residual=theirs)[0])
    torch.testing.assert_close(mine, theirs, rtol=1e-2 if dtype == torch.bfloat16 else 0, atol=0)


def test_every_head_of_a_slice_is_a_run_of_its_own() -> None:
    wide, weight = drawn(5, 3 * 4 * 24), drawn(24, seed=1)
    heads = wide[:, 96:192]
    normed, _ = pointwise.rms_norm(heads, weight, 1e-5, out=torch.empty_like(heads))
    near(normed, reference.rms_norm(heads, weight, 1e-5)[0])
    untouched = drawn(5, 3 * 4 * 24)
    pointwise.rms_norm(heads, weight, 1e-5, out=heads)
    near(wide[:, 96:192], normed)
    assert torch.equal(wide[:, :96], untouched[:, :96])
    assert torch.equal(wide[:, 192:], untouched[:, 192:])


def test_a_long_row_without_a_residual_is_read_twice() -> None:
    x, weight = drawn(2, 17000), drawn(17000, seed=1)
    near(pointwise.rms_norm(x, weight, 1e-5)[0], reference.rms_norm(x, weight, 1e-5)[0])


def test_large_halves_do_not_overflow() -> None:
    x, weight = drawn(2, 64, dtype=torch.float16) * 10000, torch.ones(64, device=DEVICE)
    near(pointwise.rms_norm(x, weight, 1e-5)[0], reference.rms_norm(x, weight, 1e-5)[0])


def test_no_rows_are_no_work() -> None:
    normed, _ = pointwise.rms_norm(drawn(0, 64), drawn(64), 1e-5)
    assert normed.shape == (0, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [128, 4096, 8192, 16384, 32768])
def test_on_a_gpu_the_norm_is_within_a_rounding_of_float64(size: int) -> None:
    x, weight = drawn(1000, size, dtype=torch.bfloat16), drawn(size, dtype=torch.bfloat16, seed=1)
    residual = drawn(1000, size, dtype=torch.bfloat16, seed=2)
    exact = (x.float() + residual.float()).bfloat16().double()
    exact = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    normed, _ = pointwise.rms_norm(x, weight, 1e-6, residual=residual)
    torch.testing.assert_close(normed.double(), exact, rtol=2**-8, atol=1e-6)
