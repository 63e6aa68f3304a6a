"""How a call is cut into programs, from what the host knows of the step: never from its data.

A request of at most SHORT new tokens goes the way of decode (its keys cut into segments), a longer
one that of prefill. In deterministic mode all go one way, whose tile and segments are the same in
every step (`in_order.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tidegate.kernels.launch import Gpu, Launch, launch_for

SHORT: Final = 8
"""New tokens up to which reading the cache, not arithmetic, is what takes time: a decode step with
a few guesses. Tokens of one tile share the reading."""
MOST_ROWS: Final = 128
"""Rows of the largest tile, so the most query heads that may share a key/value head."""
SEGMENT: Final = 1024
"""Keys of a segment in deterministic mode. Half of it makes single requests faster and needs twice
the workspace; by rule, not measured."""
SMALLEST_SEGMENT: Final = 128
"""Keys below which a segment of its own costs more than it wins; by rule, not measured."""
PROGRAMS_PER_PROCESSOR: Final = 4
"""Programs wanted per multiprocessor: two fit at a time, and uneven lengths even out over more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """Query rows and keys that one step of a program multiplies, and how it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a layer's attention is made for, as far as tiles depend on it."""

    heads: int
    kv_heads: int
    head_size: int
    query_bytes: int
    """Of one value of q."""
    kv_bytes: int

    @property
    def share(self) -> int:
        """Query heads of one key/value head."""
        return self.heads // self.kv_heads

    @property
    def columns(self) -> int:
        """The head size filled up to a power of two; 32 is the least that 8 bits multiply at."""
        return max(32, power_of_two(self.head_size))


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePlan:
    """How the requests of few tokens are cut."""

    tile: Tile
    tile_tokens: int
    tiles: int
    """Tiles of a request."""
    most_tokens: int
    """New tokens of a request that takes this way."""
    segments: int


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderedPlan:
    """How the requests of a step are cut in deterministic mode: the tile is the same in all."""

    tile: Tile
    most_tokens: int
    """New tokens of a request whose segments have programs of their own."""
    segments: int
    floats: int
    """Float32 values between these programs and `join`: none where there is only one segment."""


def plan_decode(
    shape: Shape,
    gpu: Gpu,
    *,
    requests: int,
    most_tokens: int,
    most_length: int,
) -> DecodePlan:
    """The cut for a step of `requests` requests, padding included."""
    tokens = min(most_tokens, SHORT)
    wanted = min(shape.share * tokens, max(shape.share, 32))
    tile = decode_tile(shape, gpu, power_of_two(max(16, wanted)))
    tiles = -(-tokens // (tile.rows // shape.share))
    fitting = gpu.processors * PROGRAMS_PER_PROCESSOR // (requests * tiles * shape.kv_heads)
    segments = min(fitting, -(-most_length // SMALLEST_SEGMENT))
    return DecodePlan(
        tile=tile,
        tile_tokens=tile.rows // shape.share,
        tiles=tiles,
        most_tokens=tokens,
        segments=max(1, segments),
    )


def plan_in_order(
    shape: Shape, gpu: Gpu, *, requests: int, most_tokens: int, most_length: int
) -> OrderedPlan:
    """The cut of deterministic mode for a step of `requests` requests, padding included."""
    tokens, segments = min(most_tokens, SHORT), -(-most_length // SEGMENT)
    rows = requests * tokens * shape.heads * segments
    return OrderedPlan(
        tile=ordered_tile(shape, gpu),
        most_tokens=tokens,
        segments=segments,
        floats=0 if segments == 1 else rows * (shape.head_size + 1),
    )


def workspace_floats(
    shape: Shape,
    gpu: Gpu,
    *,
    most_requests: int,
    most_length: int,
    most_tokens: int = SHORT,
    deterministic: bool = False,
) -> int:
    """Float32 values that every step within the limits finds enough between its two kernels.

    Args:
        shape: the layer's.
        gpu: what the steps run on.
        most_requests: of one step, padding included.
        most_length: tokens of one request, new ones included.
        most_tokens: new tokens of the longest request; SHORT covers all there are.
        deterministic: whether steps run so.
    """
    if deterministic:  # more of anything takes more
        return plan_in_order(
            shape,
            gpu,
            requests=most_requests,
            most_tokens=most_tokens,
            most_length=most_length,
        ).floats
    return max(
        between_floats(
            shape,
            plan_decode(shape, gpu, requests=requests, most_tokens=tokens, most_length=most_length),
            requests,
        )
        for requests in range(1, most_requests + 1)
        for tokens in range(1, min(most_tokens, SHORT) + 1)
    )


def between_floats(shape: Shape, plan: DecodePlan, requests: int) -> int:
    """Float32 values of one step's segments: none where there is only one."""
    if plan.segments == 1:
        return 0
    rows = requests * plan.most_tokens * shape.heads * plan.segments
    return rows * (shape.head_size + 1)


def ordered_tile(shape: Shape, gpu: Gpu) -> Tile:
    """The tile of deterministic mode, for one token and for many."""
    launch = launch_for(
        "attention",
        "in_order",
        gpu,
        columns=shape.columns,
        query_bytes=shape.query_bytes,
        share=shape.share,
    )
    return _tile(launch, max(launch["rows"], power_of_two(shape.share)))


def prefill_tile(shape: Shape, gpu: Gpu, *, windowed: bool) -> Tile:
    """The tile for many tokens."""
    launch = launch_for(
        "attention",
        "prefill",
        gpu,
        columns=shape.columns,
        query_bytes=shape.query_bytes,
        kv_bytes=shape.kv_bytes,
        windowed=int(windowed),
    )
    return _tile(launch, max(launch["rows"], power_of_two(shape.share)))


def decode_tile(shape: Shape, gpu: Gpu, rows: int) -> Tile:
    """The tile of so many rows for few tokens."""
    row_bytes = shape.columns * shape.kv_bytes
    return _tile(launch_for("attention", "decode", gpu, rows=rows, row_bytes=row_bytes), rows)


def _tile(launch: Launch, rows: int) -> Tile:
    return Tile(
        rows=rows, keys=launch["keys"], warps=launch["num_warps"], stages=launch["num_stages"]
    )


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
