"""Nodes of an OpenVINO graph: file-backed constants and the patterns that the CPU plugin fuses.

A node is an output or an operation of `openvino`, whose types mypy does not follow. Every function
here emits one shape of graph that the plugin turns into one kernel; written otherwise the result
is the same and slow. Which form fuses was found by reading back the compiled graph of
OpenVINO 2026.4; `tests/converters/test_openvino_ops.py` repeats that.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.opset13 as op

from tidegate.model.architecture import AttentionSpec, Rope
from tidegate.model.packed import Array, Bytes, Linear, PackedLinear, pack_nibbles

Node: TypeAlias = Any
"""An `openvino.Node` or `openvino.Output`."""

_SEGMENT_BYTES = 1 << 28
_ALIGNMENT = 64

_TABLE_ROWS = 256
"""Rows of the fine rotary table; the coarse one has `context / 256`."""


class ConstantFile:
    """Constants whose values lie in a scratch file and are mapped, not held.

    A model in memory is therefore as large as its largest layer while it is being built. The
    file must outlive every model that uses its constants: OpenVINO keeps a bare pointer.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self._segments: list[Bytes] = []
        self._start = self._used = self._end = 0

    def __enter__(self) -> ConstantFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._path.unlink()

    def constant(self, values: npt.NDArray[np.generic], kind: Node, shape: tuple[int, ...]) -> Node:
        """A constant of `kind`, an `openvino.Type`; 4-bit values come packed low nibble first."""
        if self._start + self._used + values.nbytes > self._end:
            self._add_segment(values.nbytes)
        self._file.seek(self._start + self._used)
        # Written and not stored through the mapping, where a full disk would be a signal.
        np.ascontiguousarray(values).tofile(self._file)
        self._file.flush()
        mapped = self._segments[-1][self._used : self._used + values.nbytes]
        self._used += -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT
        shaped = mapped.view(values.dtype)
        return ov.op.Constant(ov.Tensor(shaped, ov.Shape(list(shape)), kind))

    def _add_segment(self, needed_bytes: int) -> None:
        """Map more of the file. Large pieces, because every mapping holds a file descriptor."""
        size = max(needed_bytes, _SEGMENT_BYTES)
        self._start, self._used = self._end, 0
        self._end += size
        self._file.truncate(self._end)
        self._segments.append(np.memmap(self._file, np.uint8, "r+", self._start, (size,)))

    def weight(self, linear: Linear) -> Node:
        """The float32 weight [out, in], decompressed from the packed one by the pattern that fuses.

        A packed weight keeps the padding of its last group: [out, groups * group_size].
        """
        if not isinstance(linear, PackedLinear):
            return self.constant(linear.weight, ov.Type.f32, (linear.outputs, linear.inputs))
        kind = ov.Type.u4 if linear.bits == 4 else ov.Type.u8
        rows, groups = linear.outputs, linear.groups
        values = self.constant(linear.values, kind, (rows, groups, linear.group_size))
        scales = self.constant(linear.scales.astype(np.float16), ov.Type.f16, (rows, groups, 1))
        # The zero-point stays an integer: with a float one the plugin drops to float activations.
        centred = op.subtract(
            op.convert(values, "f16"), op.convert(self._zero_points(linear, kind), "f16")
        )
        flat = op.reshape(
            op.multiply(centred, scales), ints(rows, groups * linear.group_size), False
        )
        return op.convert(flat, "f32")

    def _zero_points(self, linear: PackedLinear, kind: Node) -> Node:
        zeros = np.full((1, 1), linear.symmetric_zero, np.uint8)
        if linear.zeros is not None:
            zeros = linear.zeros
        shape = (*zeros.shape, 1)
        packed: Bytes = pack_nibbles(zeros.reshape(-1)) if linear.bits == 4 else zeros
        return self.constant(packed, kind, shape)


def ints(*values: int) -> Node:
    """A constant int64 vector: shapes, axes and lengths."""
    return op.constant(np.array(values, np.int64))


def scalar(value: np.generic) -> Node:
    """A constant of rank 0."""
    return op.constant(np.array(value))


def vector(values: npt.NDArray[np.generic]) -> Node:
    """A constant [1, n] that broadcasts over rows."""
    return op.constant(values[None])


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
    return (
        [x] if len(lengths) == 1 else list(op.variadic_split(x, ints(1), ints(*lengths)).outputs())
    )


def rms_norm(x: Node, weight: Array, eps: float) -> Node:
    """RMS norm in the form that fuses into one kernel."""
    square = op.reduce_mean(op.power(x, scalar(np.float32(2))), ints(-1), True)
    root = op.sqrt(op.add(square, scalar(np.float32(eps))))
    normal = op.multiply(x, op.divide(scalar(np.float32(1)), root))
    return op.multiply(normal, vector(weight))


def rotary_angles(positions: Node, rope: Rope, head_size: int, context: int) -> tuple[Node, Node]:
    """Cosine and sine [T, 1, 1, H] of the positions [T], each frequency twice (rotate-half).

    A position is `256 * high + low`, both parts are looked up in tables made in double precision,
    and the angles added: cos(a + b) = cos a cos b - sin a sin b. A float32 product of position
    and frequency would be off by 1e-3 radians at position 8192, a full table 32 MiB at 131072.
    """
    low_cos, low_sin = _turns(np.arange(_TABLE_ROWS), rope, head_size)
    starts = np.arange(0, context, _TABLE_ROWS)
    high_cos, high_sin = _turns(starts, rope, head_size)
    rows = scalar(np.int32(_TABLE_ROWS))
    high, low = op.divide(positions, rows), op.floor_mod(positions, rows)
    axis = scalar(np.int64(0))
    ca, sa = (op.gather(op.constant(table), high, axis) for table in (high_cos, high_sin))
    cb, sb = (op.gather(op.constant(table), low, axis) for table in (low_cos, low_sin))
    cos = op.subtract(op.multiply(ca, cb), op.multiply(sa, sb))
    sin = op.add(op.multiply(sa, cb), op.multiply(ca, sb))
    # One and two axes go in before the head's: [T, 1, 1, H].
    return tuple(op.unsqueeze(op.concat([part, part], -1), ints(1, 2)) for part in (cos, sin))


def _turns(positions: npt.NDArray[np.int64], rope: Rope, head_size: int) -> tuple[Array, Array]:
    """Cosine and sine [n, H / 2] of the positions, rounded once."""
    half = head_size // 2
    angles = positions[:, None] * rope.theta ** (-np.arange(half, dtype=np.float64) / half)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: Node, heads: int, head_size: int, angles: tuple[Node, Node]) -> Node:
    """Rotate the heads of `x` [T, heads * H]; four dimensions, because only those fuse."""
    cos, sin = angles
    x = op.reshape(x, ints(0, heads, 1, head_size), True)
    half = head_size // 2
    low = op.slice(x, ints(0), ints(half), ints(1), ints(3))
    high = op.slice(x, ints(half), ints(2**31 - 1), ints(1), ints(3))
    minus = op.constant(np.full((1, 1, 1, 1), -1, np.float32))
    turned = op.concat([op.multiply(high, minus), low], -1)
    rotated = op.add(op.multiply(x, cos), op.multiply(turned, sin))
    return op.reshape(rotated, ints(0, heads * head_size), True)


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
    values as `SDPAToPagedAttention` of OpenVINO 2026.4 emits them. Absent features (sliding
    window, ALiBi, score windows, rotation, sparse attention, sinks, eviction, image spans, tree
    masks) are empty tensors or zeros.
    """
    off = scalar(np.int32(0))
    no_ints, no_floats = op.constant(np.zeros(0, np.int32)), op.constant(np.zeros(0, np.float32))
    inputs = [query, key, value, *caches]
    inputs += [step[name] for name in ("past_lens", "subsequence_begins")]
    inputs += [step[name] for name in ("block_indices", "block_indices_begins")]
    inputs += [scalar(np.float32(spec.scale)), off, no_floats, step["max_context_len"]]
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
