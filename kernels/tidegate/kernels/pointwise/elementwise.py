"""Kernels of gated activations, and of factors, cuts and soft caps.

The hyperbolic tangent is spelled out, since Triton has none that its interpreter knows: near 0 by
its series, whose next term is below float32 rounding there, else by the exponential.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate_rows(
    gate_up: tl.tensor,
    out: tl.tensor,
    inner: tl.int32,
    gate_up_stride: tl.int64,
    out_stride: tl.int64,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`act(gate) * up`, BLOCK values of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < inner
    source = gate_up + row * gate_up_stride + columns
    gate = tl.load(source, mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    up = tl.load(source + inner, mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    result = activated(gate, ACT) * up
    tl.store(out + row * out_stride + columns, result.to(out.dtype.element_ty), mask)


@triton.jit
def adjust_values(
    x: tl.tensor,
    out: tl.tensor,
    count: tl.int64,
    factor: tl.float32,
    limit: tl.float32,
    cap: tl.float32,
    LIMITED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A factor, then a cut to [-limit, limit], then a soft cap."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < count
    values = tl.load(x + places, mask, other=0.0).to(tl.float32) * factor
    if LIMITED:
        values = tl.minimum(tl.maximum(values, -limit), limit)
    if CAPPED:
        values = cap * tangent(values / cap)
    tl.store(out + places, values.to(out.dtype.element_ty), mask)


@triton.jit
def activated(x: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    """The non-linearity of `tidegate.model.architecture.Activation`."""
    if ACT == "silu":
        return x * logistic(x)
    elif ACT == "relu":
        return tl.maximum(x, 0.0)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACT == "gelu_tanh")
        # 0.5 * (1 + tanh(y)) is sigmoid(2 * y), with y = sqrt(2 / pi) * (x + 0.044715 * x^3).
        return x * logistic(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def logistic(x: tl.tensor) -> tl.tensor:
    """1 / (1 + e^-x); cut where e^-x would pass what float32 holds."""
    return 1.0 / (1.0 + tl.exp(-tl.maximum(x, -80.0)))


@triton.jit
def tangent(x: tl.tensor) -> tl.tensor:
    """The hyperbolic tangent, to float32 rounding."""
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315))))
    size = tl.minimum(tl.abs(x), 20.0)
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(square < 0.0225, series, tl.where(x < 0, -large, large))
