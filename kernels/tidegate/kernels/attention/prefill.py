"""Attention of requests with many new tokens: a program per tile of query rows and key/value head.

Tiles are counted over all requests and found by their number, so that the grid depends on nothing
that the host does not know. The last tiles of a request see the most keys and begin first. Only
runs of keys on the diagonal and at the window's edge are masked.
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


# What differs from step to step must not ask for another compilation. One function, though long:
# half of it are arguments, and a part of its body would take nearly as many.
@triton.jit(do_not_specialize=["starts", "lengths", "blocks", "blocks_stride", "requests"])
def prefill(
    q_at: tl.tensor,
    out_at: tl.tensor,
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
    SHORT: tl.constexpr,
    SHARE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """Grid (K, T // (BLOCK_M // SHARE) + B); requests of at most SHORT new tokens are skipped."""
    tile_tokens: tl.constexpr = BLOCK_M // SHARE
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    request, start, new, offset = own_tile(starts, requests, tile, tile_tokens)
    if (new <= SHORT) | (offset >= new):
        return
    q, token, query_head = query_tile(
        q_at, q_stride, start, offset, new, head, SHARE, HEAD_SIZE, BLOCK_M, BLOCK_H
    )
    past = tl.load(lengths + request) - new
    position = tl.where(token >= 0, past + token, -1)
    end = past + tl.minimum(offset + tile_tokens, new)
    table = blocks + request.to(tl.int64) * blocks_stride
    cache = (keys_at, values_at, key_scales, value_scales, table, head, kv_heads)
    rule = (window, cap, factor)
    queries, sums = split(q, keys_at), no_sums(BLOCK_M, BLOCK_H)
    inner = 0
    diagonal = (past + offset + 1) // BLOCK_N * BLOCK_N
    if window is not None:
        first = first_key(past + offset, window, BLOCK_N)
        inner = tl.cdiv(tl.maximum(end - window, 0), BLOCK_N) * BLOCK_N
        inner = tl.minimum(tl.maximum(inner, first), diagonal)
        sums = sweep(
            queries, sums, position, first, inner, end, cache, rule, HEAD_SIZE, BLOCK_TOKENS,
            BLOCK_N, True, q.dtype,
        )  # fmt: skip
    sums = sweep(
        queries, sums, position, inner, diagonal, end, cache, rule, HEAD_SIZE, BLOCK_TOKENS,
        BLOCK_N, False, q.dtype,
    )  # fmt: skip
    sums = sweep(
        queries, sums, position, diagonal, end, end, cache, rule, HEAD_SIZE, BLOCK_TOKENS,
        BLOCK_N, True, q.dtype,
    )  # fmt: skip
    rows = finish(sums, sinks, query_head)
    store_rows(out_at, rows, start, token, query_head, kv_heads * SHARE, HEAD_SIZE)
