"""Kernels up to the likeliest token of each row: edits, the peak of each tile, the row's.

A row with a logit that is NaN or plus infinity is unsound, masked or not, and gets no token. Tokens
that may not be chosen yet are minus infinity unless nothing else is left: then they come back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tidegate.kernels.sampling.weighing import (
    COLUMNS,
    FREQUENCY,
    PRESENCE,
    REPETITION,
    allowed,
)


@triton.jit
def edit_rows(
    logits: tl.tensor,
    numbers: tl.tensor,
    starts: tl.tensor,
    edits: tl.tensor,
    saved: tl.tensor,
    stride: tl.int64,
    BLOCK: tl.constexpr,
) -> None:
    """Bias and penalties of one row, in place; `saved` keeps what barred tokens would have."""
    row = tl.program_id(0)
    mine = numbers + row * COLUMNS
    factor = tl.load(mine + REPETITION)
    begin, end = tl.load(starts + row), tl.load(starts + row + 1)
    for start in range(begin, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        mask = places < end
        token = tl.load(edits + places * 4, mask, other=0)
        bias = tl.load(edits + places * 4 + 1, mask, other=0).to(tl.float32, bitcast=True)
        count = tl.load(edits + places * 4 + 2, mask, other=-1)
        barred = tl.load(edits + places * 4 + 3, mask, other=0)
        where = logits + row.to(tl.int64) * stride + token
        value = tl.load(where, mask, other=0.0) + bias
        wide = value.to(tl.float64)
        wide = tl.where(wide > 0, wide / factor, wide * factor)
        wide -= tl.load(mine + FREQUENCY) * count
        wide -= tl.load(mine + PRESENCE) * tl.where(count > 0, 1.0, 0.0)
        value = tl.where(count >= 0, wide.to(tl.float32), value)
        tl.store(saved + places, value, mask)
        # What is not a number stays, so that the row is found to be unsound.
        hidden = (barred != 0) & (value < float("inf"))
        tl.store(where, tl.where(hidden, -float("inf"), value), mask)


@triton.jit
def find_peaks(
    logits: tl.tensor,
    masks: tl.tensor,
    integers: tl.tensor,
    part_peaks: tl.tensor,
    tile_peaks: tl.tensor,
    tile_tokens: tl.tensor,
    vocab: tl.int32,
    stride: tl.int64,
    words: tl.int32,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """The largest of every PART tokens and of the tile of PARTS such; NaN if it is unsound."""
    row, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    part = tl.arange(0, PARTS)
    ids = tile * PARTS * PART + part[:, None] * PART + tl.arange(0, PART)[None, :]
    inside = ids < vocab
    x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=inside, other=-float("inf"))
    unsound = tl.max(tl.where((x != x) | (x == float("inf")), 1, 0))
    if masks is not None:
        masked = tl.load(integers + row * 2 + 1)
        bits = masks + row.to(tl.int64) * words
        x = tl.where(allowed(ids, bits, masked, inside), x, -float("inf"))
    x = tl.where(x != x, float("inf"), x)
    peaks = tl.max(x, axis=1)
    peak = tl.max(peaks, axis=0)
    token = tl.min(tl.where(x == peak, ids, 0x7FFFFFFF))
    tl.store(part_peaks + (row * tiles + tile) * PARTS + part, peaks)
    tl.store(tile_peaks + row * tiles + tile, tl.where(unsound != 0, float("nan"), peak))
    tl.store(tile_tokens + row * tiles + tile, token)


@triton.jit
def settle_rows(
    logits: tl.tensor,
    masks: tl.tensor,
    integers: tl.tensor,
    starts: tl.tensor,
    edits: tl.tensor,
    saved: tl.tensor,
    part_peaks: tl.tensor,
    tile_peaks: tl.tensor,
    tile_tokens: tl.tensor,
    peaks: tl.tensor,
    tokens: tl.tensor,
    stride: tl.int64,
    words: tl.int32,
    parts: tl.int32,
    TILE_COUNT: tl.constexpr,
    TILES: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The likeliest token of a row, -1 of an unsound one, whose peak is then NaN."""
    row = tl.program_id(0)
    tile = tl.arange(0, TILES)
    mask = tile < TILE_COUNT
    found = tl.load(tile_peaks + row * TILE_COUNT + tile, mask, other=-float("inf"))
    unsound = tl.max(tl.where(found != found, 1, 0))
    found = tl.where(found != found, -float("inf"), found)
    peak = tl.max(found)
    likeliest = tl.load(tile_tokens + row * TILE_COUNT + tile, mask, other=0x7FFFFFFF)
    best = tl.min(tl.where(found == peak, likeliest, 0x7FFFFFFF))
    if edits is not None:  # noqa: SIM102  (known when compiled, the other one is not)
        if (peak == -float("inf")) & (unsound == 0):
            masked = tl.load(integers + row * 2 + 1)
            begin, end = tl.load(starts + row), tl.load(starts + row + 1)
            for start in range(begin, end, BLOCK):
                places = start + tl.arange(0, BLOCK)
                barred = tl.load(edits + places * 4 + 3, places < end, other=0) != 0
                token = tl.load(edits + places * 4, barred, other=0)
                value = tl.load(saved + places, barred, other=-float("inf"))
                tl.store(logits + row.to(tl.int64) * stride + token, value, barred)
                # Whatever skips parts by their peaks must not skip this one.
                tl.store(part_peaks + row * parts + token // PART, float("inf"), barred)
                if masks is not None:
                    bits = masks + row.to(tl.int64) * words
                    value = tl.where(allowed(token, bits, masked, barred), value, -float("inf"))
                top = tl.max(value)
                first = tl.min(tl.where(barred & (value == top), token, 0x7FFFFFFF))
                best = tl.where(
                    top > peak, first, tl.where(top == peak, tl.minimum(best, first), best)
                )
                peak = tl.maximum(peak, top)
    sound = (unsound == 0) & (peak > -float("inf"))
    tl.store(peaks + row, tl.where(sound, peak, float("nan")))
    tl.store(tokens + row, tl.where(sound, best, -1))
