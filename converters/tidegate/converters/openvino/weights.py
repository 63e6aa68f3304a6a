"""Weights of an OpenVINO graph: streamed to its file, in the pattern that stays compressed.

The CPU plugin multiplies 4- and 8-bit weights as they are, and gathers rows of them, when it finds
exactly convert, subtract, multiply, reshape, convert behind the constant. Anything else becomes a
float32 weight, eight times as large.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.opset13 as op

from tidegate.converters.openvino.file import Place, align, write_graph
from tidegate.converters.openvino.graph import Node, ints
from tidegate.errors import ConversionError
from tidegate.model.packed import (
    Bytes,
    DenseLinear,
    Linear,
    LowRankLinear,
    PackedLinear,
    pack_nibbles,
)

_PLACEHOLDER_BYTES = 1 << 26

AnyArray = npt.NDArray[np.generic]


class ConstantFile:
    """Constants whose values go to a file at once; the graph gets placeholders of zeros.

    All placeholders share one stretch of memory that nobody writes to, so the operating system
    backs it with its page of zeros and it costs nothing. `save` writes the graph and moves the
    file beside it. Until then the graph's constants are zeros: it must not be compiled. This
    object must outlive every model that uses its constants: OpenVINO keeps a bare pointer.
    """

    def __init__(self, path: Path) -> None:
        """Stream to `path`, which is removed again unless it is saved."""
        self._path = path
        self._file = path.open("wb")
        self._zeros: list[Bytes] = []
        self._constants: list[tuple[Node, Place]] = []

    def __enter__(self) -> ConstantFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def constant(
        self, values: AnyArray | Iterable[AnyArray], kind: Node, shape: tuple[int, ...]
    ) -> Node:
        """A constant of `kind`, an `openvino.Type`; 4-bit values come packed low nibble first.

        Values may come in parts, of which one is held at a time.
        """
        offset = align(self._file)
        for part in [values] if isinstance(values, np.ndarray) else values:
            little = np.ascontiguousarray(part, part.dtype.newbyteorder("<"))
            self._file.write(little.reshape(-1).view(np.uint8).data)
        nbytes = self._file.tell() - offset
        zeros = self._placeholder(nbytes)
        constant = ov.op.Constant(ov.Tensor(zeros, ov.Shape(list(shape)), kind))
        assert constant.get_byte_size() == nbytes, f"{nbytes} bytes are no {kind} of {shape}"
        self._constants.append((constant, Place(offset=offset, nbytes=nbytes)))
        return constant

    def save(self, model: Node, path: Path) -> None:
        """Write the graph to `path` and its constants beside it, as `.bin`; only once.

        Raises:
            OSError: a file cannot be written.
            RuntimeError: OpenVINO cannot write the graph.
        """
        places = {constant.get_friendly_name(): place for constant, place in self._constants}
        write_graph(model, path, self._file, places)
        self._file.close()
        self._path.replace(path.with_suffix(".bin"))

    def _placeholder(self, nbytes: int) -> Bytes:
        if not self._zeros or self._zeros[-1].nbytes < nbytes:
            # Large, because small memory is recycled and then cleared, which makes it real.
            self._zeros.append(np.zeros(max(nbytes, _PLACEHOLDER_BYTES), np.uint8))
        return self._zeros[-1][:nbytes]

    def weight(self, linear: Linear) -> Node:
        """The float32 weight [out, in], decompressed from the packed one by the pattern that fuses.

        A packed weight keeps the padding of its last group: [out, groups * group_size].

        Raises:
            ConversionError: the layer is a product of two weights, which are lowered each.
        """
        if isinstance(linear, LowRankLinear):
            raise ConversionError("a low-rank layer is no single weight")
        if isinstance(linear, DenseLinear):
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
