"""Kernels that gather rows: of a dense table, of a packed one, of activations."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_rows(
    table: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    factor: tl.float32,
    table_stride: tl.int64,
    out_stride: tl.int64,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Row `rows[i]` of the table becomes row `i`, BLOCK values a program."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    values = tl.load(table + row * table_stride + columns, mask, other=0.0)
    if SCALED:
        values = values.to(tl.float32) * factor
    tl.store(out + place * out_stride + columns, values.to(out.dtype.element_ty), mask)


@triton.jit
def unpack_rows(
    values: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    factor: tl.float32,
    out_stride: tl.int64,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """As `copy_rows`, from integers; a program reads BLOCK * BITS / 8 bytes."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place).to(tl.int64)
    shares: tl.constexpr = 8 // BITS  # values of one byte
    row_bytes: tl.constexpr = GROUPS * GROUP_SIZE // shares
    at = tl.program_id(1) * (BLOCK // shares) + tl.arange(0, BLOCK // shares)
    packed = tl.load(values + row * row_bytes + at, at < row_bytes, other=0).to(tl.int32)
    if BITS == 4:
        packed = tl.interleave(packed & 15, packed >> 4)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    group = row * GROUPS + columns // GROUP_SIZE
    zero = 1 << (BITS - 1)
    if zeros is not None:
        zero = tl.load(zeros + group, mask, other=0).to(tl.int32)
    scale = tl.load(scales + group, mask, other=0.0).to(tl.float32)
    result = (packed - zero).to(tl.float32) * scale * factor
    tl.store(out + place * out_stride + columns, result.to(out.dtype.element_ty), mask)
