"""Kernels of the RMS norm, with the residual sum before it.

Rows are read once where they fit a program (16k values), else twice, the second time from the
cache. The sum is rounded as it is stored before it is squared, so that the fused form equals the
sum and the norm one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl


# What differs from step to step must not ask for another compilation.
@triton.jit(do_not_specialize=["runs"])
def norm_rows(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    runs: tl.int32,
    runs_per_row: tl.int32,
    x_stride: tl.int64,
    residual_stride: tl.int64,
    out_stride: tl.int64,
    eps: tl.float32,
    SIZE: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """RUNS runs of SIZE values a program; BLOCK is the power of two that holds SIZE."""
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    row, inside = run // runs_per_row, (run % runs_per_row) * SIZE
    columns = tl.arange(0, BLOCK)
    mask = (run < runs)[:, None] & (columns < SIZE)[None, :]
    places = inside[:, None] + columns[None, :]
    values = tl.load(
        x + row[:, None] * x_stride + places, mask, other=0.0, eviction_policy="evict_first"
    ).to(tl.float32)
    if residual is not None:
        kept = residual + row[:, None] * residual_stride + places
        values += tl.load(kept, mask, other=0.0).to(tl.float32)
        stored = values.to(residual.dtype.element_ty)
        tl.store(kept, stored, mask)
        values = stored.to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, axis=1) / SIZE + eps)
    scale = tl.load(
        weight + columns, mask=columns < SIZE, other=0.0, eviction_policy="evict_last"
    ).to(tl.float32)
    normed = values * factor[:, None] * scale[None, :]
    tl.store(out + row[:, None] * out_stride + places, normed.to(out.dtype.element_ty), mask)


@triton.jit
def norm_long_rows(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    runs_per_row: tl.int32,
    x_stride: tl.int64,
    residual_stride: tl.int64,
    out_stride: tl.int64,
    eps: tl.float32,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One run a program, BLOCK values at a time."""
    run = tl.program_id(0).to(tl.int64)
    row, inside = run // runs_per_row, (run % runs_per_row) * SIZE
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    source = x + row * x_stride + inside
    for start in range(0, SIZE, BLOCK):
        mask = start + columns < SIZE
        values = tl.load(source + start + columns, mask, other=0.0).to(tl.float32)
        if residual is not None:
            kept = residual + row * residual_stride + inside + start + columns
            values += tl.load(kept, mask, other=0.0).to(tl.float32)
            stored = values.to(residual.dtype.element_ty)
            tl.store(kept, stored, mask)
            values = stored.to(tl.float32)
        squares += values * values
    factor = tl.rsqrt(tl.sum(squares, axis=0) / SIZE + eps)
    if residual is not None:
        source = residual + row * residual_stride + inside
    for start in range(0, SIZE, BLOCK):
        mask = start + columns < SIZE
        values = tl.load(source + start + columns, mask, other=0.0).to(tl.float32)
        scale = tl.load(weight + start + columns, mask, other=0.0).to(tl.float32)
        normed = (values * factor * scale).to(out.dtype.element_ty)
        tl.store(out + row * out_stride + inside + start + columns, normed, mask)
