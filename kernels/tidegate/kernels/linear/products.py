"""Kernels of linear layers: 4- and 8-bit tiles with the inputs split, and dense in a fixed order.

The inputs of a tile are split over programs when there are few tokens, so that enough bytes are
under way to fill the memory's bandwidth. Each program leaves its sums in a workspace and counts
itself; whoever comes last adds them all up, in the order of the splits. So the result does not
depend on who that is, and there is no second launch. The order of a row's sums depends on the
number of splits and the size of the blocks, not on how many tokens there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tidegate.kernels.linear.tiles import dense_sums, tile_sums


@triton.jit
def sum_over_splits(
    sums: tl.tensor,
    partial: tl.tensor,
    arrived: tl.tensor,
    block: tl.tensor,
    part: tl.tensor,
    known: tl.tensor,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """Leave one split's sums; the last to come gets the total and True, the others False.

    Only columns that are `known`, [1, TOKENS], go through memory.
    """
    SIZE: tl.constexpr = sums.shape[0] * sums.shape[1]
    row = tl.arange(0, sums.shape[0])[:, None] * sums.shape[1]
    place = row + tl.arange(0, sums.shape[1])[None, :]
    mine = partial + (block * SPLITS + part).to(tl.int64) * SIZE
    tl.store(mine + place, sums, mask=known)
    # Every thread's sums are written before one of them says so.
    tl.debug_barrier()
    last = tl.atomic_add(arrived + block, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    total = tl.zeros_like(sums)
    if last:
        # Not from the first-level cache, which does not see what others wrote. Few numbers a thread
        # are unrolled, so that the loads of all splits are under way at once.
        first = partial + (block * SPLITS).to(tl.int64) * SIZE
        if SIZE < 2048:
            for other in tl.static_range(SPLITS):
                start = first + other * SIZE
                total += tl.load(start + place, mask=known, other=0.0, cache_modifier=".cg")
        else:
            for other in range(SPLITS):
                start = first + other * SIZE
                total += tl.load(start + place, mask=known, other=0.0, cache_modifier=".cg")
        tl.store(arrived + block, 0)
    return total, last


@triton.jit
def store_sums(
    sums: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    out_stride: tl.tensor,
    HAS_BIAS: tl.constexpr,
) -> None:
    """Write [rows, tokens] sums to `out` [T, outputs], with the bias, if there is one."""
    if HAS_BIAS:
        sums += tl.load(bias + row, mask=row < outputs, other=0.0).to(tl.float32)[:, None]
    place = token.to(tl.int64)[None, :] * out_stride + row[:, None]
    inside = (token < tokens)[None, :] & (row < outputs)[:, None]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def tiled_kernel(
    x: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    arrived: tl.tensor,
    tokens: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    steps: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
    APART: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """A block of TILES * 64 outputs by TOKENS tokens; grid (blocks of outputs, splits, of tokens).

    APART says that every split has a program; else each program goes through all of them.
    """
    tile, part = tl.program_id(0) * TILES, tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    start, known = x + token.to(tl.int64)[None, :] * x_stride, (token < tokens)[None, :]
    per_split, most = tl.cdiv(steps, SPLITS), tl.cdiv(outputs, 64) - 1
    first = part * per_split
    last = tl.minimum(first + per_split, steps)
    # fmt: off
    sums = tile_sums(start, known, values, scales, zeros, tile, most, first, last, steps, inputs,
                     TILES, TOKENS, STEP, BITS, SYMMETRIC, EVEN, STAGES)
    written = True
    if SPLITS > 1 and APART:
        block = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        sums, written = sum_over_splits(sums, partial, arrived, block, part, known, SPLITS)
    elif SPLITS > 1:
        for other in range(1, SPLITS):
            begin = other * per_split
            end = tl.minimum(begin + per_split, steps)
            sums += tile_sums(start, known, values, scales, zeros, tile, most, begin, end, steps,
                              inputs, TILES, TOKENS, STEP, BITS, SYMMETRIC, EVEN, STAGES)
    # fmt: on
    if written:
        row = tile * 64 + tl.arange(0, TILES * 64)
        store_sums(sums, bias, out, row, token, tokens, outputs, out_stride, HAS_BIAS)


@triton.jit(do_not_specialize=["tokens"])
def dense_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    arrived: tl.tensor,
    tokens: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    out_stride: tl.tensor,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    APART: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """The same of a dense weight [outputs, inputs]."""
    part = tl.program_id(1)
    row = tl.program_id(0) * TILES * 64 + tl.arange(0, TILES * 64)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    start, known = x + token.to(tl.int64)[None, :] * x_stride, (token < tokens)[None, :]
    rows = weight + tl.minimum(row, outputs - 1).to(tl.int64)[:, None] * weight_stride
    steps = tl.cdiv(inputs, STEP)
    per_split = tl.cdiv(steps, SPLITS)
    first = part * per_split
    last = tl.minimum(first + per_split, steps)
    sums = dense_sums(start, known, rows, first, last, inputs, TILES * 64, TOKENS, STEP, STAGES)
    written = True
    if SPLITS > 1 and APART:
        block = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        sums, written = sum_over_splits(sums, partial, arrived, block, part, known, SPLITS)
    elif SPLITS > 1:
        for other in range(1, SPLITS):
            begin = other * per_split
            end = tl.minimum(begin + per_split, steps)
            sums += dense_sums(
                start, known, rows, begin, end, inputs, TILES * 64, TOKENS, STEP, STAGES
            )
    if written:
        store_sums(sums, bias, out, row, token, tokens, outputs, out_stride, HAS_BIAS)
