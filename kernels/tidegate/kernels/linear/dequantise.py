"""A tiled weight written out in rows, for products of so many tokens that this soon pays."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidegate.kernels.linear.tiles import row_numbers, tile_numbers, widen
from tidegate.kernels.linear.weights import TILE_ROWS, TiledLinear

Tensor = torch.Tensor


@triton.jit
def dequantise_kernel(
    values: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    out: tl.tensor,
    steps: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
) -> None:
    """One tile; grid (tiles along the inputs, along the outputs)."""
    TYPE: tl.constexpr = out.dtype.element_ty
    WORDS: tl.constexpr = 2 * STEP * BITS
    step, tile = tl.program_id(0), tl.program_id(1)
    at = tile.to(tl.int64) * steps + step
    words = tl.load(values + at * WORDS + tl.arange(0, WORDS)[None, :])
    pair = at * 32 + tl.arange(0, 32)[None, :]
    zero = 0.5 * 2**BITS
    if not SYMMETRIC:
        zero = tile_numbers(tl.load(zeros + pair), 1)
    integers = widen(words, zero, 1, STEP, BITS, TYPE).to(tl.float32)
    row = tile * 64 + tl.arange(0, 64)[:, None]
    column = step * STEP + tl.arange(0, STEP)[None, :]
    weight = (integers * row_numbers(tl.load(scales + pair), 1)).to(TYPE)
    inside = (row < outputs) & (column < inputs)
    tl.store(out + row.to(tl.int64) * inputs + column, weight, mask=inside)


def dequantise(weight: TiledLinear, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """The weight that `weight` stands for, rounded to `dtype`.

    Args:
        weight: the tiles.
        dtype: float32, float16 or bfloat16.
        out: [outputs, inputs] of `dtype`, without gaps, to write into.

    Returns:
        [outputs, inputs].
    """
    if out is None:
        shape = (weight.outputs, weight.inputs)
        out = torch.empty(shape, dtype=dtype, device=weight.values.device)
    dequantise_kernel[(weight.steps, -(-weight.outputs // TILE_ROWS))](
        weight.values,
        weight.scales,
        weight.zeros,
        out,
        weight.steps,
        weight.inputs,
        weight.outputs,
        STEP=weight.step,
        BITS=weight.bits,
        SYMMETRIC=weight.zeros is None,
        num_warps=4,
    )
    return out
