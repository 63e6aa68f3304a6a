"""Kernels of 8-bit weights with 8-bit activations: rows rounded in one pass, then the product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidegate.kernels.linear.int8 import Int8Linear
from tidegate.kernels.linear.plan import ProductPlan
from tidegate.kernels.linear.products import store_sums, sum_over_splits
from tidegate.kernels.linear.workspace import LinearWorkspace, workspace_for

Tensor = torch.Tensor
_LONGEST_BLOCK = 8192


@triton.jit
def quantise_kernel(
    x: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    inputs: tl.tensor,
    padded: tl.tensor,
    x_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One token: its largest magnitude, then its inputs as int8, 0 beyond them; grid (T,)."""
    token = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, BLOCK)
    row = x + token * x_stride
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, inputs, BLOCK):
        column = start + within
        part = tl.load(row + column, mask=column < inputs, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(part))
    scale = tl.maximum(tl.max(largest, axis=0), 1e-30) / 127
    tl.store(scales + token, scale)
    for start in range(0, padded, BLOCK):
        column = start + within
        part = tl.load(row + column, mask=column < inputs, other=0.0).to(tl.float32)
        # Adding 1.5 * 2 ** 23 leaves no digit behind the point: rounds half to even.
        rounded = (part * (1 / scale) + 12582912.0) - 12582912.0
        tl.store(out + token * padded + column, rounded.to(tl.int8), mask=column < padded)


@triton.jit
def int8_sums(
    left: tl.tensor,
    right: tl.tensor,
    scales: tl.tensor,
    shifts: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    outputs: tl.tensor,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    SHIFTED: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """Some steps' products, scaled, float32 [ROWS, TOKENS]; pointers are at the first step.

    `scales` and `shifts` point at each row's, [ROWS], `outputs` apart from step to step.
    """
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        inputs = tl.load(right + step * STEP)
        product = tl.dot(tl.load(left + step * STEP), inputs).to(tl.float32)
        if SHIFTED:
            # A row of ones sums each token's inputs; every row of the product is that sum.
            ones = tl.full([ROWS, STEP], 1, tl.int8)
            shift = tl.load(shifts + step * outputs)
            product += shift[:, None] * tl.dot(ones, inputs).to(tl.float32)
        sums += tl.load(scales + step * outputs)[:, None] * product
    return sums


@triton.jit(do_not_specialize=["tokens"])
def w8a8_kernel(
    rows: tl.tensor,
    row_scales: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    shifts: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    arrived: tl.tensor,
    tokens: tl.tensor,
    padded: tl.tensor,
    outputs: tl.tensor,
    out_stride: tl.tensor,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    SHIFTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    APART: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """TILES * 64 outputs by TOKENS tokens; grid (blocks of outputs, splits, blocks of tokens)."""
    part = tl.program_id(1)
    row = tl.program_id(0) * TILES * 64 + tl.arange(0, TILES * 64)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    known_row, known_token = tl.minimum(row, outputs - 1), tl.minimum(token, tokens - 1)
    k = tl.arange(0, STEP)
    left = values + known_row.to(tl.int64)[:, None] * padded + k[None, :]
    right = rows + known_token.to(tl.int64)[None, :] * padded + k[:, None]
    steps = padded // STEP
    per_split = tl.cdiv(steps, SPLITS)
    first = part * per_split
    last = tl.minimum(first + per_split, steps)
    scales += known_row
    if SHIFTED:
        shifts += known_row
    # fmt: off
    sums = int8_sums(left, right, scales, shifts, first, last, outputs,
                     TILES * 64, TOKENS, STEP, SHIFTED, STAGES)
    written = True
    if SPLITS > 1 and APART:
        block = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        known = (token < tokens)[None, :]
        sums, written = sum_over_splits(sums, partial, arrived, block, part, known, SPLITS)
    elif SPLITS > 1:
        for other in range(1, SPLITS):
            begin = other * per_split
            end = tl.minimum(begin + per_split, steps)
            sums += int8_sums(left, right, scales, shifts, begin, end, outputs,
                              TILES * 64, TOKENS, STEP, SHIFTED, STAGES)
    # fmt: on
    if written:
        sums *= tl.load(row_scales + known_token)[None, :]
        store_sums(sums, bias, out, row, token, tokens, outputs, out_stride, HAS_BIAS)


def launch_w8a8(
    x: Tensor,
    weight: Int8Linear,
    out: Tensor,
    plan: ProductPlan,
    workspace: LinearWorkspace | None,
) -> None:
    """Round [T, in] and multiply it into `out` [T, out]."""
    workspace = workspace or workspace_for(plan, x.device, tokens=len(x), padded=weight.padded)
    workspace.check(plan, rounded=len(x) * weight.padded)
    rows, row_scales = workspace.rows, workspace.row_scales
    block = min(_LONGEST_BLOCK, triton.next_power_of_2(weight.padded))
    quantise_kernel[(len(x),)](
        x, rows, row_scales, weight.inputs, weight.padded, x.stride(0), BLOCK=block, num_warps=4
    )
    w8a8_kernel[plan.grid](
        rows,
        row_scales,
        weight.values,
        weight.scales,
        weight.shifts,
        weight.bias,
        out,
        workspace.partial,
        workspace.arrived,
        len(x),
        weight.padded,
        weight.outputs,
        out.stride(0),
        TILES=plan.block_tiles,
        TOKENS=plan.block_tokens,
        STEP=weight.step,
        SHIFTED=weight.shifts is not None,
        HAS_BIAS=weight.bias is not None,
        SPLITS=plan.splits,
        APART=plan.apart,
        STAGES=plan.num_stages,
        num_warps=plan.num_warps,
    )
