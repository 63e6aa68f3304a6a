"""One tile of query rows against the keys of its request: what prefill and decode share.

A row is one query head of one token; all heads that share a key/value head lie side by side, so
that even a single token fills a tile of the tensor cores. Sums of a row, kept from run to run
(Milakov & Gimelshein 2018; Dao et al. 2022): `most` is the largest score so far times `factor`,
`total` the sum of `exp2(score * factor - most)`, `mixed` the values in these proportions. A hidden
key adds exactly 0, so what a row gets does not depend on the other rows of its tile.

Three tuples go from function to function: `queries` is what `split` makes of q; `cache` is (keys,
values, key scales or None, value scales or None, the request's row of the block table, head, K);
`rule` is (window or None, cap or None, factor), where scores are `factor * q.k`, or `factor *
tanh(cap * q.k)` with a softcap, in units of which exp2 is the exponential.
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
def own_tile(
    starts: tl.tensor, requests: tl.tensor, tile: tl.tensor, TILE_TOKENS: tl.constexpr
) -> tl.tuple:
    """Tile number `tile`: its request, that one's first token and how many, and the tile's offset.

    The offset is of the tile's first token within the request; none is there from `new` on.
    """
    request, first_tile = find_request(starts, requests, tile, TILE_TOKENS)
    start = tl.load(starts + request)
    new = tl.load(starts + request + 1) - start
    return request, start, new, (tile - first_tile) * TILE_TOKENS


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
def split(q: tl.tensor, keys_at: tl.tensor) -> tl.tuple:
    """Queries as the products with the keys take them: (whole, rest, step).

    Against int8 keys, q is `step * (254 * whole + rest)` in two int8 tiles, right to 2 ** -16 of a
    row's largest value: their products are exact and no key has to be turned into another type.
    Against others they stay as they are, as does float32, which only tests use: whole is q then.
    """
    if keys_at.dtype.element_ty == tl.int8 and q.dtype != tl.float32:
        wide = q.to(tl.float32)
        step = tl.max(tl.abs(wide), axis=1) / 127.0
        steps = wide / tl.where(step > 0.0, step, 1.0)[:, None]
        whole = rounded(steps)
        rest = rounded((steps - whole) * 254.0)
        return whole.to(tl.int8), rest.to(tl.int8), step / 254.0
    else:
        return q, q, q


@triton.jit
def rounded(x: tl.tensor) -> tl.tensor:
    """To the nearest integer: adding 1.5 * 2 ** 23 leaves float32 no fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def products(queries: tl.tuple, key: tl.tensor) -> tl.tensor:
    """Float32 q.k of a tile's rows with keys [BLOCK_N, BLOCK_H]."""
    whole, rest, step = queries
    if whole.dtype != tl.int8:
        return tl.dot(whole, tl.trans(widened(key, whole.dtype)), input_precision="ieee")
    else:  # 254 * 127 * 127 * H fits 32 bits up to H = 512
        turned = tl.trans(key)
        coarse = tl.dot(whole, turned, out_dtype=tl.int32) * 254
        return tl.dot(rest, turned, coarse, out_dtype=tl.int32).to(tl.float32) * step[:, None]


@triton.jit
def widened(stored: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Keys or values as DTYPE, 8 bits the way that takes the fewest instructions on Hopper.

    An integer is put into the fraction of 1.5 * 2 ** 23 and that taken off again; fp8 is a float16
    first, of which there are two in a register, and no conversion unit is waited for.
    """
    if stored.dtype == tl.int8:
        stored = (stored.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    elif stored.dtype == tl.float8e4nv:
        stored = stored.to(tl.float16).to(tl.float32)
    return stored.to(DTYPE)


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
    queries: tl.tuple,
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
    DTYPE: tl.constexpr,
) -> tl.tuple:
    """Take in the BLOCK_N keys from `begin`, of which those below `end` are there.

    MASKED is False only where every row sees all of them; the sums are the same either way.
    """
    most, total, mixed = sums
    keys_at, values_at, key_scales, value_scales = cache[0], cache[1], cache[2], cache[3]
    window, cap, factor = rule
    keys = begin + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, mixed.shape[1])[None, :]
    place, places = places_of(cache, begin, end, BLOCK_TOKENS, BLOCK_N)
    at = places[:, None] * HEAD_SIZE + columns
    key = tl.load(keys_at + place * HEAD_SIZE + at, mask=columns < HEAD_SIZE, other=0.0)
    scores = products(queries, key)
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
    value = tl.load(values_at + place * HEAD_SIZE + at, mask=mask, other=0.0)
    value = widened(value, DTYPE)
    mixed = tl.dot(weights.to(DTYPE), value, mixed * kept[:, None], input_precision="ieee")
    return higher, total, mixed


@triton.jit
def sweep(
    queries: tl.tuple,
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
    DTYPE: tl.constexpr,
) -> tl.tuple:
    """Take in the keys from `begin` to `stop`, of which those below `end` are there."""
    for at in range(begin, stop, BLOCK_N):
        sums = visit(
            queries, sums, position, at, end, cache, rule, HEAD_SIZE, BLOCK_TOKENS, BLOCK_N,
            MASKED, DTYPE,
        )  # fmt: skip
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
        total = tl.fma(total, kept, tl.exp2(sink - level))
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
