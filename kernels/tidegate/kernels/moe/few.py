"""Products of few pairs of token and expert: 16 outputs of one pair a program, steps abreast.

At one token a layer's experts are a few small matrices; see `tidegate.kernels.linear.few` for how
these are read by enough programs. Inputs are summed in another order than in `products`, so this is
not for the mode in which a token must not depend on how many others there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tidegate.kernels.linear.few import abreast_sums, own_sums
from tidegate.kernels.moe.products import activated


@triton.jit
def pair_sums(
    token: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    expert: tl.tensor,
    rows: tl.tensor,
    inputs: tl.tensor,
    ABREAST: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """16 of an expert's `rows` outputs for the inputs at `token`, [16, 2]; the second is 0."""
    group = tl.program_id(0)
    column = tl.arange(0, ABREAST * 2)[None, :]
    tile = expert * tl.cdiv(rows, 64) + group // 4
    # fmt: off
    sums = abreast_sums(token + column * 0, column % 2 == 0, values, scales, zeros, tile, group % 4,
                        tl.cdiv(inputs, STEP), inputs,
                        ABREAST, 2, STEP, BITS, SYMMETRIC, EVEN, STAGES)
    # fmt: on
    return own_sums(sums, ABREAST, 2)


@triton.jit
def store_first(numbers: tl.tensor, out: tl.tensor, rows: tl.tensor) -> None:
    """The first column of [16, 2] to a pair's `rows` outputs at `out`."""
    row = tl.program_id(0) * 16 + tl.arange(0, 16)[:, None]
    first = tl.arange(0, 2)[None, :] == 0
    tl.store(out + row + first * 0, numbers.to(out.dtype.element_ty), mask=(row < rows) & first)


@triton.jit
def few_gate_up_kernel(
    x: tl.tensor,
    experts: tl.tensor,
    gate_values: tl.tensor,
    gate_scales: tl.tensor,
    gate_zeros: tl.tensor,
    up_values: tl.tensor,
    up_scales: tl.tensor,
    up_zeros: tl.tensor,
    inner: tl.tensor,
    x_stride: tl.tensor,
    width: tl.tensor,
    rows: tl.tensor,
    CHOSEN: tl.constexpr,
    ACT: tl.constexpr,
    ABREAST: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """`act(gate(x)) * up(x)` into `inner` [pairs, rows]; grid (groups of 16 rows, pairs)."""
    pair = tl.program_id(1)
    expert = tl.load(experts + pair)
    token = x + (pair // CHOSEN).to(tl.int64) * x_stride
    # fmt: off
    gate = pair_sums(token, gate_values, gate_scales, gate_zeros, expert, rows, width,
                     ABREAST, STEP, BITS, SYMMETRIC, EVEN, STAGES)
    up = pair_sums(token, up_values, up_scales, up_zeros, expert, rows, width,
                   ABREAST, STEP, BITS, SYMMETRIC, EVEN, STAGES)
    # fmt: on
    store_first(activated(gate, ACT) * up, inner + pair.to(tl.int64) * rows, rows)


@triton.jit
def few_down_kernel(
    inner: tl.tensor,
    experts: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    answers: tl.tensor,
    inputs: tl.tensor,
    width: tl.tensor,
    ABREAST: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """`down(inner)` into `answers` [pairs, width]; grid (groups of 16 outputs, pairs)."""
    pair = tl.program_id(1).to(tl.int64)
    # fmt: off
    sums = pair_sums(inner + pair * inputs, values, scales, zeros, tl.load(experts + pair), width,
                     inputs, ABREAST, STEP, BITS, SYMMETRIC, EVEN, STAGES)
    # fmt: on
    store_first(sums, answers + pair * width, width)
