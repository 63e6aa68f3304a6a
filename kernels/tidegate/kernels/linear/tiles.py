"""What the kernels over weights share: widening a tile in registers, and a block's sums.

The weight is the left operand of the matrix instruction and the tokens are the right one, so few
tokens cost few columns. 16 are the fewest: for 8, Triton 3.6 takes an older instruction, whose
operand lies otherwise and which may round otherwise. Integers are widened without a conversion
instruction: a 4-bit v becomes the number 16 + v by placing it below a fixed exponent, an 8-bit one
1024 + v in float16 and 2 ** 23 + v in float32 (for bfloat16, which has too few digits), and the
zero-point with the same offset is subtracted, which is exact. Integers up to 256 are exact in
bfloat16, so a tile's product is that of the integers; its scale is applied to the float32 sum.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def number_pairs(
    words: tl.tensor, PLACE: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr
) -> tl.tensor:
    """Integer `PLACE` and the one 16 bits above it as 16-bit floats plus an offset, in one word.

    For float32 they stay integers, 16 bits apart.
    """
    MASK: tl.constexpr = 0x000F000F if BITS == 4 else 0x00FF00FF
    if TYPE == tl.float32:
        pairs = (words >> (BITS * PLACE)) & MASK
    else:
        # 4 bits go to the top of a mantissa of 7 (bfloat16) or 10 bits (float16), 8 to its end.
        UP: tl.constexpr = 0 if BITS == 8 else (3 if TYPE == tl.bfloat16 else 6)
        BASE: tl.constexpr = 0x6400 if BITS == 8 else (0x4180 if TYPE == tl.bfloat16 else 0x4C00)
        SHIFT: tl.constexpr = BITS * PLACE - UP
        moved = words >> SHIFT if SHIFT >= 0 else words << (0 - SHIFT)
        pairs = (moved & (MASK << UP)) | (BASE * 0x10001)
    return pairs


@triton.jit
def split_pairs(words: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """The low and the high half of each word as `TYPE`, on a new last axis."""
    both = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)
    if TYPE == tl.float32:
        # 2 ** 23 + v, then 2 ** 23 taken away: exact, and no slow conversion.
        numbers = (both | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    else:
        numbers = both.to(tl.int16).to(TYPE, bitcast=True)
    return numbers


@triton.jit
def widen(
    words: tl.tensor,
    zero: tl.tensor,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    TYPE: tl.constexpr,
) -> tl.tensor:
    """Tiles, int32 [TILES, words], as integers less `zero`, `TYPE` [TILES * 64, STEP].

    `zero` is a number, or as `tile_numbers` gives it. The order is that of `TiledLinear`.
    """
    WITHIN: tl.constexpr = tl.float32 if BITS == 8 and TYPE == tl.bfloat16 else TYPE
    OFFSET: tl.constexpr = 0.0 if WITHIN == tl.float32 else (16.0 if BITS == 4 else 1024.0)
    LOW: tl.constexpr = min(STEP // 16, 16 // BITS)
    if BITS == 4:
        even = tl.join(number_pairs(words, 0, 4, WITHIN), number_pairs(words, 2, 4, WITHIN))
        odd = tl.join(number_pairs(words, 1, 4, WITHIN), number_pairs(words, 3, 4, WITHIN))
        pairs = tl.join(even, odd)
    else:
        pairs = tl.join(number_pairs(words, 0, 8, WITHIN), number_pairs(words, 1, 8, WITHIN))
    parts = tl.reshape(
        split_pairs(pairs, WITHIN), [TILES, STEP // (16 * LOW), 4, 8, 4, LOW, 2, 2, 2]
    )
    parts = (parts - (zero + OFFSET).to(WITHIN)).to(TYPE)
    return tl.reshape(tl.permute(parts, [0, 2, 7, 3, 1, 5, 6, 4, 8]), [TILES * 64, STEP])


@triton.jit
def tile_numbers(pairs: tl.tensor, TILES: tl.constexpr) -> tl.tensor:
    """A number per row, pairs [TILES, 32], as float16 that lies as the integers of `widen` do."""
    return tl.reshape(split_pairs(pairs, tl.float16), [TILES, 1, 4, 8, 1, 1, 1, 2, 1])


@triton.jit
def row_numbers(pairs: tl.tensor, TILES: tl.constexpr) -> tl.tensor:
    """A number per row, pairs [TILES, 32], as float32 [TILES * 64, 1]."""
    numbers = tl.reshape(split_pairs(pairs, tl.float16), [TILES * 4, 8, 2])
    return tl.reshape(tl.permute(numbers, [0, 2, 1]), [TILES * 64, 1]).to(tl.float32)


@triton.jit
def tile_sums(
    x: tl.tensor,
    known: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    tile: tl.tensor,
    most: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    steps: tl.tensor,
    inputs: tl.tensor,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """Products of TILES * 64 outputs with TOKENS tokens over some steps, float32 [outputs, tokens].

    `x` points at the first input of each token and `known` says which tokens there are, [1,
    TOKENS]; the others are not read. `tile` is the first of the tiles and `most` the last that
    there is, read again in place of what is beyond. EVEN says that `inputs` fill the steps.
    """
    TYPE: tl.constexpr = x.dtype.element_ty
    WORDS: tl.constexpr = 2 * STEP * BITS
    tiles = tl.minimum(tile + tl.arange(0, TILES), most).to(tl.int64) * steps
    k = tl.arange(0, STEP)
    pair = tl.arange(0, 32)[None, :]
    sums = tl.zeros([TILES * 64, TOKENS], tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        at = (tiles + step)[:, None]
        words = tl.load(values + at * WORDS + tl.arange(0, WORDS)[None, :])
        scale = row_numbers(tl.load(scales + at * 32 + pair), TILES)
        zero = 0.5 * 2**BITS
        if not SYMMETRIC:
            zero = tile_numbers(tl.load(zeros + at * 32 + pair), TILES)
        column = step * STEP + k[:, None]
        if EVEN:
            tokens = tl.load(x + column, mask=known, other=0.0)
        else:
            tokens = tl.load(x + column, mask=known & (column < inputs), other=0.0)
        weight = widen(words, zero, TILES, STEP, BITS, TYPE)
        sums += scale * tl.dot(weight, tokens, input_precision="ieee")
    return sums


@triton.jit
def dense_sums(
    x: tl.tensor,
    known: tl.tensor,
    weight: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    inputs: tl.tensor,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """The same of a dense weight: `weight` points at the first input of each row, [ROWS, 1]."""
    k = tl.arange(0, STEP)
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        column = step * STEP + k
        rows = tl.load(weight + column[None, :], mask=column[None, :] < inputs, other=0.0)
        read = known & (column[:, None] < inputs)
        tokens = tl.load(x + column[:, None], mask=read, other=0.0)
        sums = tl.dot(rows, tokens, sums, input_precision="ieee")
    return sums
