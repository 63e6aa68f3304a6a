"""Weights of an OpenVINO graph: file-backed constants, in the pattern that stays compressed.

The CPU plugin multiplies 4- and 8-bit weights as they are, and gathers rows of them, when it finds
exactly convert, subtract, multiply, reshape, convert behind the constant. Anything else becomes a
float32 weight, eight times as large.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.opset13 as op

from tidegate.converters.openvino_graph import Node, ints
from tidegate.errors import ConversionError
from tidegate.model.packed import Bytes, Linear, LowRankLinear, PackedLinear, pack_nibbles

_SEGMENT_BYTES = 1 << 28
_ALIGNMENT_BYTES = 64


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
        self._used += -(-values.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
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
        if isinstance(linear, LowRankLinear):
            raise ConversionError("a low-rank table: OpenVINO's lowering has none")
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
