"""Rows of a tiled weight, for an embedding table that is the head's weight too.

The words of a row lie beside one another in runs of 64 bytes, each shared with the row 8 above or
below, so reading a row from tiles costs twice its bytes and a table needs no second copy in rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidegate.kernels.linear.weights import TiledLinear

Tensor = torch.Tensor


@triton.jit
def rows_kernel(
    values: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    tokens: tl.tensor,
    out: tl.tensor,
    steps: tl.tensor,
    inputs: tl.tensor,
    out_stride: tl.tensor,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
) -> None:
    """One step of one row; grid (T, steps). The order is that of `TiledLinear`."""
    LOW: tl.constexpr = min(STEP // 16, 16 // BITS)
    place, step = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(tokens + place).to(tl.int64)
    at, within = row // 64 * steps + step, row % 64
    pair = within // 16 * 8 + within % 8
    upper = within // 8 % 2
    k = tl.arange(0, STEP)
    run = k // (16 * LOW) * 32 + pair
    if BITS == 4:
        word = (run * 4 + k // 2 % 4) * LOW + k // 16 % LOW
        shift = 16 * (k % 2) + 8 * (k // 8 % 2) + 4 * upper
    else:
        word = ((run * 4 + k // 2 % 4) * LOW + k // 16 % LOW) * 2 + k // 8 % 2
        shift = 16 * (k % 2) + 8 * upper
    stored = tl.load(values + at * (2 * STEP * BITS) + word)
    integers = ((stored >> shift.to(tl.int32)) & (2**BITS - 1)).to(tl.float32)
    # Float16 pairs, read as such: the upper row's is the second.
    side = (at * 32 + pair) * 2 + upper
    zero = 0.5 * 2**BITS
    if not SYMMETRIC:
        zero = tl.load(zeros + side).to(tl.float32)
    numbers = (integers - zero) * tl.load(scales + side).to(tl.float32)
    column = step * STEP + k
    there = out + place * out_stride + column
    tl.store(there, numbers.to(out.dtype.element_ty), mask=column < inputs)


def tiled_rows(
    weight: TiledLinear, tokens: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """Rows of `weight`; the twin is `weight_matrix(weight)[tokens]`.

    Args:
        weight: the table, 4 or 8 bits.
        tokens: int32 or int64 [T], each below `weight.outputs`.
        dtype: of the result.
        out: [T, in] of `dtype` to write into; columns have no gaps.

    Returns:
        [T, in].
    """
    if out is None:
        shape = (len(tokens), weight.inputs)
        out = torch.empty(shape, dtype=dtype, device=weight.values.device)
    if len(tokens):
        rows_kernel[(len(tokens), weight.steps)](
            weight.values,
            weight.scales.view(torch.float16),
            None if weight.zeros is None else weight.zeros.view(torch.float16),
            tokens,
            out,
            weight.steps,
            weight.inputs,
            out.stride(0),
            STEP=weight.step,
            BITS=weight.bits,
            SYMMETRIC=weight.zeros is None,
            num_warps=1,
        )
    return out
