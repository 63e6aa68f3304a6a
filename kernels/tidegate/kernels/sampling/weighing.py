"""What all sampling kernels share: how a token's logit is read, ordered and weighed.

Weights are integers, 2 ** 40 for the likeliest token, so that a sum is the same in whatever order
and in how many parts it is taken: the same row gives the same token beside any others. What is
lost are tokens 28 temperatures below the peak, less than one in 2 ** 40 times as likely.

Keys are integers in the order of the logits: the bits of a float32, those of negative ones turned.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tidegate.kernels.sampling.asks import NUMBERS, Column

COLUMNS: tl.constexpr = tl.constexpr(NUMBERS)
TEMPERATURE: tl.constexpr = tl.constexpr(Column.TEMPERATURE.value)
MIN_P: tl.constexpr = tl.constexpr(Column.MIN_P.value)
TOP_P: tl.constexpr = tl.constexpr(Column.TOP_P.value)
UNIFORM: tl.constexpr = tl.constexpr(Column.UNIFORM.value)
REPETITION: tl.constexpr = tl.constexpr(Column.REPETITION.value)
FREQUENCY: tl.constexpr = tl.constexpr(Column.FREQUENCY.value)
PRESENCE: tl.constexpr = tl.constexpr(Column.PRESENCE.value)

ONE: tl.constexpr = tl.constexpr(float(2**40))
"""The weight of the likeliest token; 2 ** 18 tokens of it still fit 63 bits."""
REACH: tl.constexpr = tl.constexpr(28.0)
"""Temperatures below the peak at which weights are 0: e ** -28 is less than 2 ** -40."""
LOWEST_KEY: tl.constexpr = tl.constexpr(-2139095041)
"""The key of minus infinity."""


@triton.jit
def key_of(x: tl.tensor) -> tl.tensor:
    """Ascending int32 keys of float32 logits; both zeros have the same."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logit_of(key: tl.tensor) -> tl.tensor:
    """The float32 logit of an int32 key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def allowed(ids: tl.tensor, masks: tl.tensor, masked: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Whether a row's mask lets tokens through; all of them when it has none."""
    words = tl.load(masks + (ids >> 5), mask=inside, other=-1)
    return (tl.where(masked != 0, words >> (ids & 31), 1) & 1) != 0


@triton.jit
def logits_of(
    logits: tl.tensor, ids: tl.tensor, vocab: tl.int32, masks: tl.tensor, masked: tl.tensor
) -> tl.tensor:
    """The logits of tokens of a row; minus infinity where there is none, or it is masked."""
    inside = ids < vocab
    x = tl.load(logits + ids, mask=inside, other=-float("inf"))
    if masks is not None:
        x = tl.where(allowed(ids, masks, masked, inside), x, -float("inf"))
    return x


@triton.jit
def row_logits(
    logits: tl.tensor,
    masks: tl.tensor,
    integers: tl.tensor,
    row: tl.tensor,
    ids: tl.tensor,
    vocab: tl.int32,
    stride: tl.int64,
    words: tl.int32,
) -> tl.tensor:
    """`logits_of` of one of all rows."""
    bits = masks
    if masks is not None:
        bits = masks + row.to(tl.int64) * words
    masked = tl.load(integers + row * 2 + 1)
    return logits_of(logits + row.to(tl.int64) * stride, ids, vocab, bits, masked)


@triton.jit
def weight_of(x: tl.tensor, peak: tl.tensor, temperature: tl.tensor, min_p: tl.tensor) -> tl.tensor:
    """int64 weights of logits; 0 for those below `min_p` of the likeliest."""
    rate = 1.4426950408889634 / tl.maximum(temperature, 1e-20)
    share = tl.exp2((x - peak) * rate)
    return (tl.where(share < min_p, 0.0, share) * ONE).to(tl.int64)
