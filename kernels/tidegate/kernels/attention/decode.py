"""Attention of requests with few new tokens: the keys of one request are cut into segments.

One program reads one segment for all query heads of a key/value head, and `combine` joins what the
segments gave (Dao et al. 2023, "Flash-Decoding"). A segment is a share of what the request's tile
sees. With a single segment the result is written at once and `combine` is not needed.

Between the two: per token, query head and segment the attention within the segment, float32
[B, MOST, N, segments, H], and the log2 of its sum of exponentials, float32 [B, MOST, N, segments].
"""

from __future__ import annotations

import triton
import triton.language as tl

from tidegate.kernels.attention.tile import (
    finish,
    first_key,
    no_sums,
    query_tile,
    split,
    store_rows,
    sweep,
)


@triton.jit
def segment_bounds(
    segment: tl.tensor,
    segments: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> tl.tuple:
    """The keys [low, high) of a segment of those in [first, end); none if low >= high."""
    size = tl.cdiv(tl.cdiv(end - first, segments), BLOCK_N) * BLOCK_N
    low = first + segment * size
    return low, tl.minimum(low + size, end)


# What differs from step to step must not ask for another compilation. One function, though long:
# half of it are arguments, and a part of its body would take nearly as many.
@triton.jit(
    do_not_specialize=[
        "logs_at",
        "starts",
        "lengths",
        "blocks",
        "blocks_stride",
        "tiles",
        "most_tokens",
    ]
)
def decode(
    q_at: tl.tensor,
    out_at: tl.tensor,
    parts_at: tl.tensor,
    logs_at: tl.tensor,
    keys_at: tl.tensor,
    values_at: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    blocks: tl.tensor,
    sinks: tl.tensor,
    q_stride: tl.tensor,
    blocks_stride: tl.tensor,
    kv_heads: tl.tensor,
    window: tl.tensor,
    cap: tl.tensor,
    factor: tl.tensor,
    tiles: tl.tensor,
    most_tokens: tl.tensor,
    SHORT: tl.constexpr,
    SHARE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """Grid (B * tiles, K, segments); requests of more than SHORT new tokens are skipped."""
    request, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    head, segment, segments = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    start = tl.load(starts + request)
    new = tl.load(starts + request + 1) - start
    offset = tile * (BLOCK_M // SHARE)
    if (new > SHORT) | (offset >= new):
        return
    length = tl.load(lengths + request)
    past = length - new
    end = tl.minimum(past + offset + BLOCK_M // SHARE, length)
    first = first_key(past + offset, window, BLOCK_N)
    low, high = segment_bounds(segment, segments, first, end, BLOCK_N)
    if (parts_at is not None) & (low >= high):
        return
    q, token, query_head = query_tile(
        q_at, q_stride, start, offset, new, head, SHARE, HEAD_SIZE, BLOCK_M, BLOCK_H
    )
    position = tl.where(token >= 0, past + token, -1)
    table = blocks + request.to(tl.int64) * blocks_stride
    cache = (keys_at, values_at, key_scales, value_scales, table, head, kv_heads)
    sums = sweep(
        split(q, keys_at), no_sums(BLOCK_M, BLOCK_H), position, low, high, high, cache,
        (window, cap, factor), HEAD_SIZE, BLOCK_TOKENS, BLOCK_N, True, q.dtype,
    )  # fmt: skip
    if parts_at is None:
        rows = finish(sums, sinks, query_head)
        store_rows(out_at, rows, start, token, query_head, kv_heads * SHARE, HEAD_SIZE)
    else:
        at = (request * most_tokens + token).to(tl.int64) * (kv_heads * SHARE) + query_head
        at = at * segments + segment
        sum_log = sums[0] + tl.log2(tl.where(sums[1] == 0.0, 1.0, sums[1]))
        tl.store(logs_at + at, sum_log, mask=token >= 0)
        columns = tl.arange(0, BLOCK_H)
        mask = (token >= 0)[:, None] & (columns < HEAD_SIZE)[None, :]
        rows = finish(sums, None, query_head)
        tl.store(parts_at + at[:, None] * HEAD_SIZE + columns[None, :], rows, mask=mask)


@triton.jit(do_not_specialize=["logs_at", "starts", "lengths", "most_tokens", "segments"])
def combine(
    out_at: tl.tensor,
    parts_at: tl.tensor,
    logs_at: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    sinks: tl.tensor,
    heads: tl.tensor,
    window: tl.tensor,
    most_tokens: tl.tensor,
    segments: tl.tensor,
    SHORT: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """Join the segments, BLOCK_S at a time and in order: empty ones change no bit of the result.

    Grid (B * most_tokens, N).
    """
    request, token = tl.program_id(0) // most_tokens, tl.program_id(0) % most_tokens
    query_head = tl.program_id(1)
    start = tl.load(starts + request)
    new = tl.load(starts + request + 1) - start
    if (new > SHORT) | (token >= new):
        return
    length = tl.load(lengths + request)
    tile_past = length - new + token // TILE_TOKENS * TILE_TOKENS
    first = first_key(tile_past, window, BLOCK_N)
    end = tl.minimum(tile_past + TILE_TOKENS, length)
    at = (tl.program_id(0).to(tl.int64) * heads + query_head) * segments
    columns = tl.arange(0, BLOCK_H)[None, :]
    most, total, mixed = no_sums(1, BLOCK_H)
    for base in range(0, segments, BLOCK_S):
        segment = base + tl.arange(0, BLOCK_S)
        low, high = segment_bounds(segment, segments, first, end, BLOCK_N)
        there = (segment < segments) & (low < high)
        logs = tl.load(logs_at + at + segment, mask=there, other=float("-inf"))
        mask = there[:, None] & (columns < HEAD_SIZE)
        parts = tl.load(
            parts_at + (at + segment)[:, None] * HEAD_SIZE + columns, mask=mask, other=0.0
        )
        higher = tl.maximum(most, tl.max(logs, axis=0))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logs - level)
        kept = tl.exp2(most - level)
        total = total * kept + tl.sum(weights, axis=0)
        mixed = mixed * kept[:, None] + tl.sum(weights[:, None] * parts, axis=0)[None, :]
        most = higher
    one = tl.arange(0, 1)
    rows = finish((most, total, mixed), sinks, query_head + one)
    store_rows(out_at, rows, start, token + one, query_head + one, heads, HEAD_SIZE)
