"""The product of tiles with one to four tokens: 16 outputs a program, nothing left to add up after.

A tile's four groups of 16 rows (m5 m4 of `TiledLinear`) belong to four warps. Here each warp takes
the same 16 outputs of another step, so a program of eight warps reads eight steps at a time and
there are four times as many programs as tiles: enough to fill the memory's bandwidth without
splitting inputs over programs. The right operand holds every token once for each of the steps; of
the product only a warp's own columns are kept, and the matrix unit has the time for the others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tidegate.kernels.launch import Gpu, launch_for
from tidegate.kernels.linear.products import store_sums
from tidegate.kernels.linear.tiles import row_numbers, tile_numbers, widen
from tidegate.kernels.linear.weights import TiledLinear

Tensor = torch.Tensor
MOST_TOKENS = 4


@triton.jit
def abreast_sums(
    x: tl.tensor,
    known: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    tile: tl.tensor,
    rows: tl.tensor,
    steps: tl.tensor,
    inputs: tl.tensor,
    ABREAST: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """Sums of the 16 rows `rows` of a tile, float32 [which step and row, which step and token].

    ABREAST steps are read at a time. `x` points at the first input of each column's token and
    `known` says which there are, [1, ABREAST * TOKENS]. EVEN says that `inputs` fill the steps and
    these are a multiple of ABREAST.
    """
    WORDS: tl.constexpr = 2 * STEP * BITS
    RUN: tl.constexpr = WORDS // (4 * (STEP // (16 * min(STEP // 16, 16 // BITS))))
    TILES: tl.constexpr = ABREAST // 4
    word, pair = tl.arange(0, WORDS)[None, :], tl.arange(0, 32)[None, :]
    four = tl.arange(0, TILES)[:, None] * 4
    within = word // (4 * RUN) * (4 * RUN) + rows * RUN + word % RUN
    pair_within = rows * 8 + pair % 8
    word_step, pair_step = four + word // RUN % 4, four + pair // 8
    k = tl.arange(0, STEP)[:, None] + tl.arange(0, ABREAST * TOKENS)[None, :] // TOKENS * STEP
    sums = tl.zeros([ABREAST * 16, ABREAST * TOKENS], tl.float32)
    for step in tl.range(0, steps, ABREAST, num_stages=STAGES):
        at = tile.to(tl.int64) * steps + step
        column = step * STEP + k
        if EVEN:
            tokens = tl.load(x + column, mask=known, other=0.0)
            of_word, of_pair = word_step, pair_step
        else:
            # Past the last step a weight is read again, and multiplied by 0.
            tokens = tl.load(x + column, mask=known & (column < inputs), other=0.0)
            of_word = tl.minimum(word_step, steps - 1 - step)
            of_pair = tl.minimum(pair_step, steps - 1 - step)
        words = tl.load(values + at * WORDS + (of_word * WORDS + within))
        pairs = at * 32 + (of_pair * 32 + pair_within)
        zero = 0.5 * 2**BITS
        if not SYMMETRIC:
            zero = tile_numbers(tl.load(zeros + pairs), TILES)
        weight = widen(words, zero, TILES, STEP, BITS, x.dtype.element_ty)
        product = tl.dot(weight, tokens, input_precision="ieee")
        sums += row_numbers(tl.load(scales + pairs), TILES) * product
    return sums


@triton.jit
def own_sums(sums: tl.tensor, ABREAST: tl.constexpr, TOKENS: tl.constexpr) -> tl.tensor:
    """Of `abreast_sums`, each step's own columns, added up: float32 [16, TOKENS]."""
    row_step = tl.arange(0, ABREAST * 16)[:, None] // 16
    column_step = tl.arange(0, ABREAST * TOKENS)[None, :] // TOKENS
    own = tl.where(row_step == column_step, sums, 0.0)
    parts = tl.reshape(own, [ABREAST, 16, ABREAST, TOKENS])
    return tl.sum(tl.sum(parts, axis=2), axis=0)


@triton.jit(do_not_specialize=["tokens"])
def few_kernel(
    x: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    steps: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    ABREAST: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """16 outputs of up to TOKENS tokens; grid (groups of 16 outputs,)."""
    group = tl.program_id(0)
    column = tl.arange(0, ABREAST * TOKENS)
    start = x + (column % TOKENS).to(tl.int64)[None, :] * x_stride
    known = (column % TOKENS < tokens)[None, :]
    # fmt: off
    sums = abreast_sums(start, known, values, scales, zeros, group // 4, group % 4, steps, inputs,
                        ABREAST, TOKENS, STEP, BITS, SYMMETRIC, EVEN, STAGES)
    # fmt: on
    total = own_sums(sums, ABREAST, TOKENS)
    row, token = group * 16 + tl.arange(0, 16), tl.arange(0, TOKENS)
    store_sums(total, bias, out, row, token, tokens, outputs, out_stride, HAS_BIAS)


def suits_few(weight: TiledLinear, tokens: int, gpu: Gpu) -> bool:
    """Whether `launch_few` is the way: few tokens, and outputs enough for every processor."""
    return tokens <= MOST_TOKENS and 4 * weight.tiles >= gpu.processors


def launch_few(x: Tensor, weight: TiledLinear, out: Tensor, gpu: Gpu) -> None:
    """Multiply [T, in] by tiles into `out` [T, out]; T is 1 to 4."""
    launch = launch_for("linear", "few", gpu, tokens=len(x), step=weight.step * weight.bits // 4)
    abreast = launch["num_warps"]
    few_kernel[(-(-weight.outputs // 16),)](
        x,
        weight.values,
        weight.scales,
        weight.zeros,
        weight.bias,
        out,
        len(x),
        weight.inputs,
        weight.outputs,
        weight.steps,
        x.stride(0),
        out.stride(0),
        ABREAST=abreast,
        TOKENS=launch["tokens"],
        STEP=weight.step,
        BITS=weight.bits,
        SYMMETRIC=weight.zeros is None,
        HAS_BIAS=weight.bias is not None,
        EVEN=weight.steps * weight.step == weight.inputs and weight.steps % abreast == 0,
        STAGES=launch["num_stages"],
        num_warps=abreast,
    )
