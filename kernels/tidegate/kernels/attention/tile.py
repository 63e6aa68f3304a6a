"""One tile of query rows against the keys of its request: what prefill and decode share.

A row is one query head of one token; all heads that share a key/value head lie side by side, so
that even a single token fills a tile of the tensor cores. Sums of a row, kept from run to run
(Milakov & Gimelshein 2018; Dao et al. 2022): `most` is the largest score so far times `factor`,
`total` the sum of `exp2(score * factor - most)`, `mixed` the values in these proportions. A hidden
key adds exactly 0, so what a row gets does not depend on the other rows of its tile.

Two tuples go from function to function: `cache` is (keys, values, key scales or None, value scales
or None, the request's row of the block table, head, K), and `rule` is (window or None, cap or None,
factor), where scores are `factor * q.k`, or `factor * tanh(cap * q.k)` with a softcap, in units
of which exp2 is the exponential.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_request(
    starts: tl.tensor,
    requests: tl.tensor,
    tile: tl.tensor,
    TILE_TOKENS: tl.constexpr,
) -> tl.tuple:
    """The request that tile number `tile` belongs to, and the number of its first tile.

    Request `i` has tiles from `starts[i] // TILE_TOKENS + i` on: at least as many as it needs,
    and no more than `T // TILE_TOKENS + B` altogether, which the host knows.
    """
    before = 0
    for base in range(0, requests, 128):
        index = base + tl.arange(0, 128)
        start = tl.load(starts + index, mask=index < requests, other=0)
        first = tl.where(index < requests, start // TILE_TOKENS + index, tile + 1)
        before += tl.sum((first <= tile).to(tl.int32), axis=0)
    request = before - 1
    return request, tl.load(starts + request) // TILE_TOKENS + request


@triton.jit
def query_tile(
    q_at: tl.tensor,
    q_stride: tl.tensor,
    start: tl.tensor,
    offset: tl.tensor,
    new: tl.tensor,
    head: tl.tensor,
    SHARE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> tl.tuple:
    """Rows from token `offset` of a request that begins at token `start`.

    Returns:
        q [BLOCK_M, BLOCK_H]; of each row: its token within the request, or -1 where a row has
        none, and its query head.
    """
    row = tl.arange(0, BLOCK_M)
    token = offset + row // SHARE
    token = tl.where((row < BLOCK_M // SHARE * SHARE) & (token < new), token, -1)
    query_head = head * SHARE + row % SHARE
    columns = tl.arange(0, BLOCK_H)
    at = (start + token).to(tl.int64)[:, None] * q_stride
    at += query_head[:, None] * HEAD_SIZE + columns[None, :]
    mask = (token >= 0)[:, None] & (columns < HEAD_SIZE)[None, :]
    return tl.load(q_at + at, mask=mask, other=0), token, query_head


@triton.jit
def first_key(
    position: tl.tensor,
    window: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Where the keys begin that a query at `position` sees, at a multiple of BLOCK_N."""
    if window is None:
        return 0
    else:
        return tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N


@triton.jit
def places_of(
    cache: tl.tuple,
    begin: tl.tensor,
    end: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tuple:
    """Where BLOCK_N keys from `begin` lie: rows of [blocks * K * BLOCK_TOKENS, H].

    Returns:
        A row, int64, and what to add to it for each of the keys.
    """
    table, head, kv_heads = cache[4], cache[5], cache[6]
    offset = tl.arange(0, BLOCK_N)
    if BLOCK_TOKENS >= BLOCK_N:  # one block holds them all, begin being a multiple of BLOCK_N
        block = tl.load(table + begin // BLOCK_TOKENS).to(tl.int64)
        return (block * kv_heads + head) * BLOCK_TOKENS + begin % BLOCK_TOKENS, offset
    else:
        keys = begin + offset
        block = tl.load(table + keys // BLOCK_TOKENS, mask=keys < end, other=0).to(tl.int64)
        return head.to(
            tl.int64
        ) * BLOCK_TOKENS, block * kv_heads * BLOCK_TOKENS + keys % BLOCK_TOKENS


@triton.jit
def tanh(
    x: tl.tensor,
) -> tl.tensor:
    """The hyperbolic tangent, without an overflow; 2.885... is 2 / ln(2)."""
    small = tl.exp2(tl.abs(x) * -2.8853900817779268)
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def visit(
    q: tl.tensor,
    sums: tl.tuple,
    position: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    cache: tl.tuple,
    rule: tl.tuple,
    HEAD_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tuple:
    """Take in the BLOCK_N keys from `begin`, of which those below `end` are there.

    MASKED is False only where every row sees all of them; the sums are the same either way.
    """
    most, total, mixed = sums
    keys_at, values_at, key_scales, value_scales = cache[0], cache[1], cache[2], cache[3]
    window, cap, factor = rule
    keys = begin + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, q.shape[1])[None, :]
    place, places = places_of(cache, begin, end, BLOCK_TOKENS, BLOCK_N)
    at = places[:, None] * HEAD_SIZE + columns
    key = tl.load(keys_at + place * HEAD_SIZE + at, mask=columns < HEAD_SIZE, other=0.0)
    scores = tl.dot(q, tl.trans(key.to(q.dtype)), input_precision="ieee")
    if key_scales is not None:
        scores *= tl.load(key_scales + place + places)[None, :]
    if cap is not None:
        scores = tanh(scores * cap)
    if MASKED:
        seen = keys[None, :] <= position[:, None]
        if window is not None:
            seen &= keys[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(most, tl.max(scores, axis=1) * factor)
    level = higher
    if MASKED:  # a row that has seen nothing yet: -inf less -inf would be NaN
        level = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * factor - level[:, None])
    kept = tl.exp2(most - level)
    total = total * kept + tl.sum(weights, axis=1)
    # What lies beyond the end may be NaN, which a weight of 0 would let through.
    mask = columns < HEAD_SIZE
    if MASKED:
        mask = mask & (keys < end)[:, None]
    if value_scales is not None:
        weights *= tl.load(value_scales + place + places, mask=keys < end, other=0.0)[None, :]
    value = tl.load(values_at + place * HEAD_SIZE + at, mask=mask, other=0.0).to(q.dtype)
    mixed = tl.dot(weights.to(q.dtype), value, mixed * kept[:, None], input_precision="ieee")
    return higher, total, mixed


@triton.jit
def sweep(
    q: tl.tensor,
    sums: tl.tuple,
    position: tl.tensor,
    begin: tl.tensor,
    stop: tl.tensor,
    end: tl.tensor,
    cache: tl.tuple,
    rule: tl.tuple,
    HEAD_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tuple:
    """Take in the keys from `begin` to `stop`, of which those below `end` are there."""
    for at in range(begin, stop, BLOCK_N):
        sums = visit(
            q, sums, position, at, end, cache, rule, HEAD_SIZE, BLOCK_TOKENS, BLOCK_N, MASKED
        )
    return sums


@triton.jit
def no_sums(
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> tl.tuple:
    """The sums of rows that have seen no key."""
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return most, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_H], tl.float32)


@triton.jit
def finish(
    sums: tl.tuple,
    sinks: tl.tensor,
    query_head: tl.tensor,
) -> tl.tensor:
    """Rows of attention [BLOCK_M, BLOCK_H]: 0 for a row that saw nothing. 1.44... is 1 / ln(2)."""
    most, total, mixed = sums
    if sinks is not None:
        sink = tl.load(sinks + query_head).to(tl.float32) * 1.4426950408889634
        level = tl.maximum(most, sink)
        kept = tl.exp2(most - level)
        total = total * kept + tl.exp2(sink - level)
        mixed = mixed * kept[:, None]
    return mixed / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def store_rows(
    out_at: tl.tensor,
    rows: tl.tensor,
    start: tl.tensor,
    token: tl.tensor,
    query_head: tl.tensor,
    heads: tl.tensor,
    HEAD_SIZE: tl.constexpr,
) -> None:
    """Write rows [BLOCK_M, BLOCK_H] to out [T, N, H]."""
    columns = tl.arange(0, rows.shape[1])
    at = ((start + token).to(tl.int64) * heads + query_head)[:, None] * HEAD_SIZE + columns[None, :]
    mask = (token >= 0)[:, None] & (columns < HEAD_SIZE)[None, :]
    tl.store(out_at + at, rows.to(out_at.dtype.element_ty), mask=mask)
