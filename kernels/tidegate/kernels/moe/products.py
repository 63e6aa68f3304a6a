"""Kernels of the chosen experts: gate and up with the activation between, down, and the sum.

A block is up to TOKENS pairs of one expert (`find_block`); inputs are in one order and a pair's
numbers do not depend on the others of its block. `order` says which pair each sorted row is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tidegate.kernels.linear.tiles import dense_sums, tile_sums
from tidegate.kernels.moe.routing import find_block


@triton.jit
def activated(x: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    """The non-linearity `ACT` of float32 numbers."""
    if ACT == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACT == "relu":
        y = tl.maximum(x, 0.0)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACT == "gelu_tanh")
        # tanh(u) = 1 - 2 / (exp(2 u) + 1), with sqrt(2 / pi) in u.
        twice = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        y = x - x / (tl.exp(twice) + 1.0)
    return y


@triton.jit
def block_sums(
    start: tl.tensor,
    known: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    expert: tl.tensor,
    tile: tl.tensor,
    rows: tl.tensor,
    inputs: tl.tensor,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """TILES * 64 of one expert's `rows` outputs for a block's tokens; BITS is 16 when dense."""
    steps = tl.cdiv(inputs, STEP)
    if BITS == 16:
        row = tl.minimum(tile * 64 + tl.arange(0, TILES * 64), rows - 1)
        at = values + (expert.to(tl.int64) * rows + row)[:, None] * inputs
        sums = dense_sums(start, known, at, 0, steps, inputs, TILES * 64, TOKENS, STEP, STAGES)
    else:
        tiles = tl.cdiv(rows, 64)
        most = (expert + 1) * tiles - 1
        # fmt: off
        sums = tile_sums(start, known, values, scales, zeros, expert * tiles + tile, most, 0, steps,
                         steps, inputs, TILES, TOKENS, STEP, BITS, SYMMETRIC, EVEN, STAGES)
        # fmt: on
    return sums


@triton.jit
def gate_up_kernel(
    x: tl.tensor,
    experts: tl.tensor,
    counts: tl.tensor,
    order: tl.tensor,
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
    COUNT: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
    DIRECT: tl.constexpr,
    ACT: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """`act(gate(x)) * up(x)` into `inner` [pairs, rows], sorted; grid (blocks of rows, blocks)."""
    block = tl.program_id(1)
    expert, first, size = find_block(experts, counts, block, COUNT, COUNT_BLOCK, TOKENS, DIRECT)
    if expert >= COUNT:
        return
    within = tl.arange(0, TOKENS)
    pair = first + tl.minimum(within, size - 1)
    if not DIRECT:
        pair = tl.load(order + pair)
    known = (within < size)[None, :]
    start = x + (pair // CHOSEN).to(tl.int64)[None, :] * x_stride
    tile = tl.program_id(0) * TILES
    # fmt: off
    gate = block_sums(start, known, gate_values, gate_scales, gate_zeros, expert, tile, rows, width,
                      TILES, TOKENS, STEP, BITS, SYMMETRIC, EVEN, STAGES)
    up = block_sums(start, known, up_values, up_scales, up_zeros, expert, tile, rows, width,
                    TILES, TOKENS, STEP, BITS, SYMMETRIC, EVEN, STAGES)
    # fmt: on
    row = tile * 64 + tl.arange(0, TILES * 64)
    place = (first + within).to(tl.int64)[None, :] * rows + row[:, None]
    inside = known & (row < rows)[:, None]
    tl.store(inner + place, (activated(gate, ACT) * up).to(x.dtype.element_ty), mask=inside)


@triton.jit
def down_kernel(
    inner: tl.tensor,
    experts: tl.tensor,
    counts: tl.tensor,
    order: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    answers: tl.tensor,
    inputs: tl.tensor,
    width: tl.tensor,
    COUNT: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
    DIRECT: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """`down(inner)` into `answers` [pairs, width], no longer sorted; grid as `gate_up_kernel`."""
    block = tl.program_id(1)
    expert, first, size = find_block(experts, counts, block, COUNT, COUNT_BLOCK, TOKENS, DIRECT)
    if expert >= COUNT:
        return
    within = tl.arange(0, TOKENS)
    pair = first + tl.minimum(within, size - 1)
    known = (within < size)[None, :]
    start = inner + pair.to(tl.int64)[None, :] * inputs
    if not DIRECT:
        pair = tl.load(order + pair)
    tile = tl.program_id(0) * TILES
    # fmt: off
    sums = block_sums(start, known, values, scales, zeros, expert, tile, width, inputs,
                      TILES, TOKENS, STEP, BITS, SYMMETRIC, EVEN, STAGES)
    # fmt: on
    row = tile * 64 + tl.arange(0, TILES * 64)
    place = pair.to(tl.int64)[None, :] * width + row[:, None]
    inside = known & (row < width)[:, None]
    tl.store(answers + place, sums.to(inner.dtype.element_ty), mask=inside)


@triton.jit
def combine_kernel(
    answers: tl.tensor,
    shares: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    out_stride: tl.tensor,
    CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The weighted sum of a token's answers, in the order of the choice; grid (T, parts)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for turn in tl.static_range(CHOSEN):
        pair = token * CHOSEN + turn
        answer = tl.load(answers + pair * width + column, mask=column < width, other=0.0)
        total += tl.load(shares + pair) * answer.to(tl.float32)
    tl.store(out + token * out_stride + column, total.to(out.dtype.element_ty), mask=column < width)
