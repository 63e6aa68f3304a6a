"""Norm, clip, rotation, quantisation and the cache write of a token, in one pass over its row.

A program takes TILE_HEADS heads of one token's query, key or value. The values that a rotation
pairs are read twice, the second time from the first level of cache, so that any size of head and
of rotation is a matter of masks.
"""

from __future__ import annotations

import triton
import triton.language as tl


# What differs from step to step must not ask for another compilation. One function, though long:
# half of it are arguments, and its three ways are calls already.
@triton.jit(do_not_specialize=["positions", "places"])
def write(
    q_at: tl.tensor,
    k_at: tl.tensor,
    v_at: tl.tensor,
    out_at: tl.tensor,
    keys_at: tl.tensor,
    values_at: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    cos_at: tl.tensor,
    sin_at: tl.tensor,
    positions: tl.tensor,
    places: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    out_stride: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    eps: tl.tensor,
    clip: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr,
) -> None:
    """Grid (T, tiles of query heads + twice the tiles of key/value heads).

    HALF is half of what is rotated, 0 for nothing. Q_ROW and K_ROW take the norm over the token's
    whole row, which is then one tile.
    """
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_tiles, kv_tiles = tl.cdiv(heads, TILE_HEADS), tl.cdiv(kv_heads, TILE_HEADS)
    rope = (cos_at, sin_at, tl.load(positions + token))
    place = tl.load(places + token)
    offset = tl.arange(0, TILE_HEADS)
    if tile < q_tiles:
        head = tile * TILE_HEADS + offset
        x = prepared(
            q_at + token * q_stride, head, heads, (q_norm, eps), rope, clip, HEAD_SIZE, HALF,
            BLOCK_H, Q_ROW,
        )  # fmt: skip
        tl.debug_barrier()  # a query turned in place has been read by all threads
        columns = tl.arange(0, BLOCK_H)[None, :]
        at = out_at + token * out_stride + head[:, None] * HEAD_SIZE + columns
        mask = (head < heads)[:, None] & (columns < HEAD_SIZE)
        tl.store(at, x.to(out_at.dtype.element_ty), mask=mask)
    elif tile < q_tiles + kv_tiles:
        head = (tile - q_tiles) * TILE_HEADS + offset
        x = prepared(
            k_at + token * k_stride, head, kv_heads, (k_norm, eps), rope, clip, HEAD_SIZE, HALF,
            BLOCK_H, K_ROW,
        )  # fmt: skip
        keep(x, keys_at, key_scales, place, head, kv_heads, HEAD_SIZE, BLOCK_TOKENS)
    else:
        head = (tile - q_tiles - kv_tiles) * TILE_HEADS + offset
        x = prepared(
            v_at + token * v_stride, head, kv_heads, (None, eps), rope, clip, HEAD_SIZE, 0, BLOCK_H,
            False,
        )  # fmt: skip
        keep(x, values_at, value_scales, place, head, kv_heads, HEAD_SIZE, BLOCK_TOKENS)


@triton.jit
def prepared(
    row_at: tl.tensor,
    head: tl.tensor,
    heads: tl.tensor,
    norm: tl.tuple,
    rope: tl.tuple,
    clip: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
) -> tl.tensor:
    """Heads `head` of a row, normed, cut and rotated: float32 [TILE_HEADS, BLOCK_H]."""
    weight_at, eps = norm
    columns = tl.arange(0, BLOCK_H)[None, :]
    mask = (head < heads)[:, None] & (columns < HEAD_SIZE)
    begin = head[:, None] * HEAD_SIZE
    x = tl.load(row_at + begin + columns, mask=mask, other=0.0).to(tl.float32)
    # Of each column: what it turns with, itself where nothing turns.
    other = tl.where(columns < HALF, columns + HALF, columns - HALF)
    other = tl.where(columns < 2 * HALF, other, columns)
    pair = columns % tl.maximum(HALF, 1)
    if HALF % 8 == 0:  # what the compiler cannot see: runs of 8 stay together
        other = tl.max_contiguous(tl.multiple_of(other, [1, 8]), [1, 8])
        pair = tl.max_contiguous(tl.multiple_of(pair, [1, 8]), [1, 8])
    partner = x
    if HALF > 0:
        partner = tl.load(row_at + begin + other, mask=mask, other=0.0).to(tl.float32)
    if weight_at is not None:
        squares = tl.sum(x * x, axis=1)[:, None] / HEAD_SIZE
        weights = weight_at + tl.zeros_like(begin)
        if WHOLE_ROW:
            squares = tl.sum(squares, axis=0)[None, :] / heads
            weights = weight_at + begin
        inverse = tl.rsqrt(squares + eps)
        x = x * inverse * tl.load(weights + columns, mask=mask, other=0.0)
        partner = partner * inverse * tl.load(weights + other, mask=mask, other=0.0)
    if clip is not None:
        x = tl.minimum(tl.maximum(x, -clip), clip)
        partner = tl.minimum(tl.maximum(partner, -clip), clip)
    if HALF > 0:
        cos_at, sin_at, position = rope
        turned = columns < 2 * HALF
        angle = position.to(tl.int64) * HALF + pair
        cos = tl.load(cos_at + angle, mask=turned, other=1.0)
        sin = tl.load(sin_at + angle, mask=turned, other=0.0)
        x = x * cos + tl.where(columns < HALF, -partner, partner) * sin
    return x


@triton.jit
def keep(
    x: tl.tensor,
    stored: tl.tensor,
    scales: tl.tensor,
    place: tl.tensor,
    head: tl.tensor,
    kv_heads: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Write [TILE_HEADS, BLOCK_H] of one token to its place in the cache, quantised if it is."""
    there = head < kv_heads
    row = (place // BLOCK_TOKENS * kv_heads + head) * BLOCK_TOKENS + place % BLOCK_TOKENS
    if scales is not None:
        largest = tl.max(tl.abs(x), axis=1)
        limit: tl.constexpr = 127.0 if stored.dtype.element_ty == tl.int8 else 448.0
        tl.store(scales + row, tl.div_rn(largest, limit), mask=there)
        x = x * tl.div_rn(limit, tl.where(largest > 0.0, largest, 1.0))[:, None]
        if stored.dtype.element_ty == tl.int8:
            # 1.5 * 2 ** 23: float32 of this size have no fraction, so adding it rounds to even.
            x = (x + 12582912.0) - 12582912.0
    columns = tl.arange(0, x.shape[1])[None, :]
    mask = there[:, None] & (columns < HEAD_SIZE)
    tl.store(stored + row[:, None] * HEAD_SIZE + columns, x.to(stored.dtype.element_ty), mask=mask)
