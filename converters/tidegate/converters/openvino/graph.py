"""Nodes of an OpenVINO graph in the patterns that the CPU plugin fuses.

A node is an output or an operation of `openvino`, whose types mypy does not follow. Every function
here emits one shape of graph that the plugin turns into one kernel; written otherwise the result
is the same and slow. Which form fuses was found by reading back the compiled graph of
OpenVINO 2026.4; `tests/converters/openvino/test_ops.py` repeats that.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.opset13 as op

from tidegate.model.architecture import AttentionSpec
from tidegate.model.packed import Array
from tidegate.model.rope import Frequencies, Rope

Node: TypeAlias = Any
"""An `openvino.Node` or `openvino.Output`."""

ROWS = np.int64(0)
"""The axis of tokens, which gathers go along."""

_TABLE_ROWS = 256
"""Rows of the fine rotary table; the coarse one has `context / 256`."""


def ints(*values: int) -> Node:
    """A constant int64 vector: shapes, axes and lengths."""
    return op.constant(np.array(values, np.int64))


def scalar(value: np.generic) -> Node:
    """A constant of rank 0."""
    return op.constant(np.array(value))


def vector(values: npt.NDArray[np.generic]) -> Node:
    """A constant [1, n] that broadcasts over rows."""
    return op.constant(values[None])


def length(x: Node, axis: int) -> int:
    """How long an axis of known length is."""
    return int(_output(x).get_partial_shape()[axis].get_length())


def parameter(name: str, rank: int, kind: Node) -> Node:
    """A named graph input whose sizes are all dynamic."""
    node = op.parameter([-1] * rank, kind, name=name)
    node.output(0).set_names({name})
    return node


def pad_columns(x: Node, columns: int) -> Node:
    """Append `columns` zeros to every row of `x` [T, n]; `x` itself when there are none."""
    if columns == 0:
        return x
    return op.pad(x, ints(0, 0), ints(0, columns), "constant", scalar(np.float32(0)))


def first_columns(x: Node, columns: int) -> Node:
    """The first `columns` of every row of `x`."""
    return op.slice(x, ints(0), ints(columns), ints(1), ints(1))


def split_columns(x: Node, lengths: list[int]) -> list[Node]:
    """Cut the rows of `x` into pieces of those lengths."""
    if len(lengths) == 1:
        return [x]
    return list(op.variadic_split(x, ints(1), ints(*lengths)).outputs())


def rms_norm(x: Node, weight: Array, eps: float) -> Node:
    """RMS norm over each run of `len(weight)` values of a row, in the form that fuses."""
    columns, size = length(x, 1), weight.shape[0]
    if size == columns:
        return _normalised(x, weight, eps)
    runs = op.reshape(x, ints(0, columns // size, size), True)
    return op.reshape(_normalised(runs, weight, eps), ints(0, columns), True)


def _normalised(x: Node, weight: Array, eps: float) -> Node:
    """RMS norm over the last axis."""
    square = op.reduce_mean(op.power(x, scalar(np.float32(2))), ints(-1), True)
    root = op.sqrt(op.add(square, scalar(np.float32(eps))))
    normal = op.multiply(x, op.divide(scalar(np.float32(1)), root))
    return op.multiply(normal, vector(weight))


def rotary_angles(positions: Node, rope: Rope, context: int) -> tuple[Node, Node]:
    """Cosine and sine [T, 1, 1, size] of the positions [T], each frequency twice (rotate-half).

    A position is `256 * high + low`, both parts are looked up in tables made in double precision,
    and the angles added: cos(a + b) = cos a cos b - sin a sin b. A float32 product of position
    and frequency would be off by 1e-3 radians at position 8192, a full table 32 MiB at 131072.
    """
    turns = Rope(frequencies=rope.frequencies)
    low_cos, low_sin = _rounded(turns.tables(np.arange(_TABLE_ROWS)))
    # The magnitude is a factor of one table only.
    high_cos, high_sin = _rounded(rope.tables(np.arange(0, context, _TABLE_ROWS)))
    rows = scalar(np.int32(_TABLE_ROWS))
    high, low = op.divide(positions, rows), op.floor_mod(positions, rows)
    axis = scalar(np.int64(0))
    ca, sa = (op.gather(op.constant(table), high, axis) for table in (high_cos, high_sin))
    cb, sb = (op.gather(op.constant(table), low, axis) for table in (low_cos, low_sin))
    cos = op.subtract(op.multiply(ca, cb), op.multiply(sa, sb))
    sin = op.add(op.multiply(sa, cb), op.multiply(ca, sb))
    return tuple(op.unsqueeze(op.concat([part, part], -1), ints(1, 2)) for part in (cos, sin))


def _rounded(tables: tuple[Frequencies, Frequencies]) -> tuple[Array, Array]:
    cos, sin = tables
    return cos.astype(np.float32), sin.astype(np.float32)


def rotate(x: Node, heads: int, head_size: int, angles: tuple[Node, Node]) -> Node:
    """Rotate the heads of `x` [T, heads * H]; four dimensions, because only those fuse.

    The angles may be of fewer values than a head has; the others pass through.
    """
    cos, sin = angles
    size = length(cos, 3)
    x = op.reshape(x, ints(0, heads, 1, head_size), True)
    turning = x if size == head_size else _last_axis(x, 0, size)
    low, high = _last_axis(turning, 0, size // 2), _last_axis(turning, size // 2, 2**31 - 1)
    minus = op.constant(np.full((1, 1, 1, 1), -1, np.float32))
    turned = op.concat([op.multiply(high, minus), low], -1)
    rotated = op.add(op.multiply(turning, cos), op.multiply(turned, sin))
    if size < head_size:
        rotated = op.concat([rotated, _last_axis(x, size, 2**31 - 1)], -1)
    return op.reshape(rotated, ints(0, heads * head_size), True)


def _last_axis(x: Node, start: int, stop: int) -> Node:
    """Values `start` to `stop` of the last axis of `x`, which has four."""
    return op.slice(x, ints(start), ints(stop), ints(1), ints(3))


def paged_attention(
    query: Node,
    key: Node,
    value: Node,
    caches: tuple[Node, Node],
    step: dict[str, Node],
    spec: AttentionSpec,
) -> Node:
    """Append key and value to the caches and attend causally, [T, N * H] each.

    The 28 inputs of `PagedAttentionExtension` are positional and undocumented: order and neutral
    values as `SDPAToPagedAttention` of OpenVINO 2026.4 emits them. A window of 0 is
    none; absent features (ALiBi, score windows, rotation, sparse attention, sinks, eviction, image
    spans, tree masks) are empty tensors or zeros.
    """
    off = scalar(np.int32(0))
    no_ints, no_floats = op.constant(np.zeros(0, np.int32)), op.constant(np.zeros(0, np.float32))
    inputs = [query, key, value, *caches]
    inputs += [step[name] for name in ("past_lens", "subsequence_begins")]
    inputs += [step[name] for name in ("block_indices", "block_indices_begins")]
    window = scalar(np.int32(spec.window or 0))
    inputs += [scalar(np.float32(spec.scale)), window, no_floats, step["max_context_len"]]
    inputs += [no_ints, no_ints, no_ints, no_floats]
    inputs += [no_floats, off, off, op.constant(np.zeros((0, 0, 0, 0), np.float32))]
    inputs += [off, no_ints, no_ints, no_ints]
    inputs += [no_ints, op.constant(np.zeros(0, np.uint8)), no_ints]
    node = ov.op._PagedAttentionExtension([_output(node) for node in inputs])
    facts = node.get_rt_info()
    facts["num_k_heads"] = facts["num_v_heads"] = spec.kv_heads
    facts["k_head_size"] = facts["v_head_size"] = spec.head_size
    return node.output(0)


def _output(node: Node) -> Node:
    return node if isinstance(node, ov.Output) else node.output(0)
