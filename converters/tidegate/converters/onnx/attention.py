"""Attention as `GroupQueryAttention`: its arguments, and heads in sizes that its CPU kernel has.

The kernel wants heads of a multiple of 8 values, or of 16 with rotation, and rotates a multiple of
16 of them, value `i` with value `i + half`. Other heads are laid out anew behind the projections:
the rotated halves are filled up with values that are not rotated (their cosine is 1 and their sine
0), and the head with zeros. That changes no product of two heads, so the result is exact. It costs
a copy of query, key, value and output per layer, small beside the projections, and the zeros are
kept in the KV cache: a head of 40 rotated values takes the room of 48. Layers without need pay
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from tidegate.converters.onnx.graph import CONTRIB, Attribute, OnnxGraph
from tidegate.errors import ConversionError
from tidegate.model.architecture import AttentionSpec
from tidegate.model.packed import Array
from tidegate.model.rope import Rope

PLAIN_MULTIPLE, ROTATED_MULTIPLE = 8, 16
"""What the kernel's head sizes are multiples of; the second also of what it rotates."""

ROTATION_BLOCK = 4096
"""Positions whose angles are computed together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadLayout:
    """Where the values of a head go."""

    size: int
    """Values of a head as the kernel and the KV cache have it; zeros behind the real ones."""
    order: tuple[int, ...] | None
    """For query and key: which value of the filled-up head comes first, second, ...; None if
    they stay in place."""
    half: int
    """Columns of the cosines and sines."""


def head_layout(head_size: int, rope: Rope | None) -> HeadLayout:
    """The layout of a head of `head_size` values of which `rope` rotates the first."""
    if rope is None:
        return HeadLayout(size=_up(head_size, PLAIN_MULTIPLE), order=None, half=0)
    half = len(rope.frequencies)
    wide = _up(half, ROTATED_MULTIPLE // 2)
    size = _up(max(head_size, 2 * wide), ROTATED_MULTIPLE)
    filling, more = list(range(2 * half, size)), wide - half
    order = (
        *range(half),
        *filling[:more],
        *range(half, 2 * half),
        *filling[more:],
    )
    return HeadLayout(size=size, order=order if more else None, half=wide)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def emit_attention(
    graph: OnnxGraph, projections: Sequence[str], spec: AttentionSpec, tables: Sequence[str]
) -> str:
    """Attend over the cache, declaring this layer's `past_` inputs and `present_` outputs.

    Args:
        graph: what to append to.
        projections: query, key and value, [B, S, heads * H]; or all in one and two of "".
        spec: the layer's attention.
        tables: cosines and sines [context, `HeadLayout.half`], or two of "" without rotation.

    Returns:
        The tensor [B, S, N * H].

    Raises:
        ConversionError: the heads cannot be shared out.
    """
    if spec.heads % spec.kv_heads:
        raise ConversionError(f"kv_heads = {spec.kv_heads}: must divide the {spec.heads} heads")
    layout = head_layout(spec.head_size, spec.rope)
    if not is_plain(spec):
        query, key, value = projections
        projections = [
            _laid_out(graph, query, spec.head_size, layout.size, layout.order),
            _laid_out(graph, key, spec.head_size, layout.size, layout.order),
            _laid_out(graph, value, spec.head_size, layout.size, None),
        ]
    attended = _kernel(graph, projections, spec, tables, layout.size)
    return attended if layout.size == spec.head_size else _narrowed(graph, attended, spec, layout)


def is_plain(spec: AttentionSpec) -> bool:
    """Whether query, key and value can go to the kernel as they are, even in one tensor."""
    layout = head_layout(spec.head_size, spec.rope)
    return layout.order is None and layout.size == spec.head_size


def rotation(rope: Rope, positions: int, half: int) -> tuple[list[Array], list[Array]]:
    """Cosines and sines [positions, half], 1 and 0 where nothing is rotated.

    They come in blocks of positions: all of them in float64 would be larger than a layer.
    """
    cosines, sines = [], []
    for start in range(0, positions, ROTATION_BLOCK):
        end = min(start + ROTATION_BLOCK, positions)
        cos, sin = (part.astype(np.float32) for part in rope.tables(np.arange(start, end)))
        more = ((0, 0), (0, half - cos.shape[1]))
        cosines.append(np.pad(cos, more, constant_values=1))
        sines.append(np.pad(sin, more))
    return cosines, sines


def _kernel(
    graph: OnnxGraph,
    projections: Sequence[str],
    spec: AttentionSpec,
    tables: Sequence[str],
    size: int,
) -> str:
    """The operator itself, on heads of `size` values."""
    names = [f"{kind}.{spec.layer}" for kind in ("key", "value")]
    shape = ("B", spec.kv_heads, "C", size)
    for name in names:
        graph.input(f"past_{name}", TensorProto.FLOAT, shape)
        graph.output(f"present_{name}", TensorProto.FLOAT, shape)
    # Only what is asked for: the kernel's tuned path is the one without.
    extra: dict[str, Attribute] = {}
    if spec.window is not None:
        extra["local_window_size"] = spec.window
    if spec.softcap is not None:
        extra["softcap"] = spec.softcap
    attended = graph.name("attended")
    return graph.node(
        "GroupQueryAttention",
        [
            *projections,
            *(f"past_{name}" for name in names),
            "seqlens_k",
            "total_sequence_length",
            *tables,
        ],
        [attended, *(f"present_{name}" for name in names)],
        domain=CONTRIB,
        num_heads=spec.heads,
        kv_num_heads=spec.kv_heads,
        scale=spec.scale,
        do_rotary=int(spec.rope is not None),
        **extra,
    )


def _laid_out(
    graph: OnnxGraph, x: str, head_size: int, size: int, order: Sequence[int] | None
) -> str:
    """Heads of `head_size` filled up with zeros to `size`, their values in `order`."""
    heads = graph.node("Reshape", [x, graph.integers(0, 0, -1, head_size)])
    if size > head_size:
        zeros = graph.integers(0, 0, 0, 0, 0, 0, 0, size - head_size)
        heads = graph.node("Pad", [heads, zeros])
    if order is not None:
        heads = graph.node("Gather", [heads, graph.integers(*order)], axis=-1)
    return _flattened(graph, heads)


def _narrowed(graph: OnnxGraph, x: str, spec: AttentionSpec, layout: HeadLayout) -> str:
    """Heads without the zeros behind their values."""
    heads = graph.node("Reshape", [x, graph.integers(0, 0, spec.heads, layout.size)])
    bounds = [graph.integers(bound) for bound in (0, spec.head_size, -1)]
    return _flattened(graph, graph.node("Slice", [heads, *bounds]))


def _flattened(graph: OnnxGraph, heads: str) -> str:
    return graph.node("Reshape", [heads, graph.integers(0, 0, -1)])
