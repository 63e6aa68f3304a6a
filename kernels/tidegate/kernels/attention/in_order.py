"""Attention in one order of sums: what a token gets depends on the keys of its request alone.

Keys are cut at multiples of SEGMENT. A row's sums begin anew in each segment, and the segments are
joined one behind the other: by the program that went through all of them or, where few rows must
fill the GPU, by `join`, each segment having had a program of its own. A tile has the same rows,
keys and warps whatever the step, and both ways are one compiled kernel; what they do to a number is
the same, multiply and add being one operation (`tl.fma`) where a compiler could choose.

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
    own_tile,
    query_tile,
    split,
    store_rows,
    sweep,
)


@triton.jit
def joined(state: tl.tuple, log: tl.tensor, rows: tl.tensor) -> tl.tuple:
    """The sums of some segments and of the next one, of which `log` and `rows` are left."""
    most, total, mixed = state
    higher = tl.maximum(most, log)
    level = tl.where(higher == float("-inf"), 0.0, higher)
    weight, kept = tl.exp2(log - level), tl.exp2(most - level)
    total = tl.fma(total, kept, weight)
    mixed = tl.fma(mixed, tl.broadcast_to(kept[:, None], mixed.shape), weight[:, None] * rows)
    return higher, total, mixed


@triton.jit
def store_part(
    parts_at: tl.tensor,
    logs_at: tl.tensor,
    state: tl.tuple,
    at: tl.tensor,
    there: tl.tensor,
    HEAD_SIZE: tl.constexpr,
) -> None:
    """Leave the only segment of `state` for `join`: its total is 1, or 0 of a row without keys."""
    most, _, mixed = state
    columns = tl.arange(0, mixed.shape[1])
    tl.store(logs_at + at, most, mask=there)
    mask = there[:, None] & (columns < HEAD_SIZE)[None, :]
    tl.store(parts_at + at[:, None] * HEAD_SIZE + columns[None, :], mixed, mask=mask)


# What differs from step to step must not ask for another compilation. One function, though long:
# half of it are arguments, and a part of its body would take nearly as many.
@triton.jit(
    do_not_specialize=[
        "logs_at",
        "starts",
        "lengths",
        "blocks",
        "blocks_stride",
        "requests",
        "least_tokens",
        "most_tokens",
    ]
)
def attend(
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
    requests: tl.tensor,
    kv_heads: tl.tensor,
    window: tl.tensor,
    cap: tl.tensor,
    factor: tl.tensor,
    least_tokens: tl.tensor,
    most_tokens: tl.tensor,
    SEGMENT: tl.constexpr,
    SHARE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """Grid (K, T // (BLOCK_M // SHARE) + B, segments or 1), for `least` to `most` new tokens."""
    tile_tokens: tl.constexpr = BLOCK_M // SHARE
    head, segments = tl.program_id(0), tl.num_programs(2)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    request, start, new, offset = own_tile(starts, requests, tile, tile_tokens)
    if (new < least_tokens) | (new > most_tokens) | (offset >= new):
        return
    past = tl.load(lengths + request) - new
    end = past + tl.minimum(offset + tile_tokens, new)
    first = first_key(past + offset, window, BLOCK_N)
    begin, stop = first // SEGMENT, tl.cdiv(end, SEGMENT)
    if segments > 1:
        begin = tl.maximum(begin, tl.program_id(2))
        stop = tl.minimum(stop, tl.program_id(2) + 1)
        if begin >= stop:
            return
    q, token, query_head = query_tile(
        q_at, q_stride, start, offset, new, head, SHARE, HEAD_SIZE, BLOCK_M, BLOCK_H
    )
    position = tl.where(token >= 0, past + token, -1)
    table = blocks + request.to(tl.int64) * blocks_stride
    cache = (keys_at, values_at, key_scales, value_scales, table, head, kv_heads)
    queries, state = split(q, keys_at), no_sums(BLOCK_M, BLOCK_H)
    for segment in range(begin, stop):
        low = tl.maximum(segment * SEGMENT, first)
        high = tl.minimum(segment * SEGMENT + SEGMENT, end)
        sums = sweep(
            queries, no_sums(BLOCK_M, BLOCK_H), position, low, high, high, cache,
            (window, cap, factor), HEAD_SIZE, BLOCK_TOKENS, BLOCK_N, True, q.dtype,
        )  # fmt: skip
        log = sums[0] + tl.log2(tl.where(sums[1] == 0.0, 1.0, sums[1]))
        state = joined(state, log, finish(sums, None, query_head))
    if segments > 1:
        at = (request * most_tokens + token).to(tl.int64) * (kv_heads * SHARE) + query_head
        at = at * segments + begin
        store_part(parts_at, logs_at, state, at, token >= 0, HEAD_SIZE)
    else:
        rows = finish(state, sinks, query_head)
        store_rows(out_at, rows, start, token, query_head, kv_heads * SHARE, HEAD_SIZE)


@triton.jit(do_not_specialize=["logs_at", "starts", "lengths", "most_tokens", "segments"])
def join(
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
    SEGMENT: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """Join what the programs of one token's segments left; grid (B * most_tokens, N)."""
    request, token = tl.program_id(0) // most_tokens, tl.program_id(0) % most_tokens
    query_head, one = tl.program_id(1), tl.arange(0, 1)
    start = tl.load(starts + request)
    new = tl.load(starts + request + 1) - start
    if (new > most_tokens) | (token >= new):
        return
    length = tl.load(lengths + request)
    tile_past = length - new + token // TILE_TOKENS * TILE_TOKENS
    first = first_key(tile_past, window, BLOCK_N)
    end = tl.minimum(tile_past + TILE_TOKENS, length)
    at = (tl.program_id(0).to(tl.int64) * heads + query_head) * segments
    columns = tl.arange(0, BLOCK_H)[None, :]
    state = no_sums(1, BLOCK_H)
    for segment in range(first // SEGMENT, tl.cdiv(end, SEGMENT)):
        log = tl.load(logs_at + at + segment + one)
        place = (at + segment + one)[:, None] * HEAD_SIZE + columns
        rows = tl.load(parts_at + place, mask=columns < HEAD_SIZE, other=0.0)
        state = joined(state, log, rows)
    rows = finish(state, sinks, query_head + one)
    store_rows(out_at, rows, start, token + one, query_head + one, heads, HEAD_SIZE)
