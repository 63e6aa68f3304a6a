"""`OnnxGraph`: an ONNX graph that is built node by node while its weights stream to a file.

A tensor's bytes go to the external data file as soon as they are given; the graph keeps only the
offset. Tensors are page-aligned, so a runtime that maps the file can use them in place, and the
same bytes may be named twice under two shapes. Tensors of up to 1 KiB stay in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, CONTRIB_OPSET, IR_VERSION = 21, 1, 10
"""The versions that onnxruntime-genai's own builder emits, and runtimes are tested with."""

CONTRIB = "com.microsoft"
PAGE_BYTES = 4096
INLINE_BYTES = 1024

AnyArray = npt.NDArray[np.generic]
Attribute = int | float | str
Dimension = int | str


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Where a tensor's bytes are in the data file."""

    element_type: int
    offset: int
    nbytes: int


class OnnxGraph:
    """Collects nodes, initializers, inputs and outputs; `save` writes the graph file."""

    def __init__(self, data: BinaryIO, location: str) -> None:
        """Stream large tensors to `data`, which graph files beside it name `location`."""
        self._data, self._location = data, location
        self._stored: dict[str, Stored] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._names = 0
        self._notes: dict[str, str] = {}
        self._small: dict[tuple[str, bytes], str] = {}

    def name(self, hint: str) -> str:
        """A name that is not in use."""
        self._names += 1
        return f"{hint}.{self._names}"

    def input(self, name: str, element_type: int, shape: Sequence[Dimension]) -> None:
        """Declare a graph input; a dimension is a number or a symbol."""
        self._inputs.append(helper.make_tensor_value_info(name, element_type, shape))

    def output(self, name: str, element_type: int, shape: Sequence[Dimension]) -> None:
        """Declare the tensor `name` a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, element_type, shape))

    def node(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | None = None,
        *,
        domain: str = "",
        **attributes: Attribute,
    ) -> str:
        """Append a node and return its first output; "" leaves an optional tensor out."""
        names = [self.name(kind)] if outputs is None else list(outputs)
        node = helper.make_node(kind, inputs, names, name=names[0], domain=domain)
        node.attribute.extend(helper.make_attribute(key, to) for key, to in attributes.items())
        self._nodes.append(node)
        return names[0]

    def constant(self, hint: str, *chunks: AnyArray) -> str:
        """Add an initializer, the chunks stacked along their first axis.

        Chunks are written one after the other, so stacking needs no copy.
        """
        name, first = self.name(hint), chunks[0]
        if sum(chunk.nbytes for chunk in chunks) <= INLINE_BYTES:
            whole = np.ascontiguousarray(np.concatenate(chunks))
            self._initializers.append(numpy_helper.from_array(whole, name))
            return name
        element_type = helper.np_dtype_to_tensor_dtype(first.dtype)
        stored = self._append(chunks, element_type)
        rows = sum(chunk.shape[0] for chunk in chunks)
        return self._refer(name, stored, (rows, *first.shape[1:]))

    def integers(self, *values: int) -> str:
        """An int64 list, such as a shape; the same list is one initializer."""
        return self._shared("integers", np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """A float32 [1] to scale or compare with; the same number is one initializer."""
        return self._shared("scalar", np.array([value], np.float32))

    def _shared(self, hint: str, array: AnyArray) -> str:
        key = (hint, array.tobytes())
        if key not in self._small:
            self._small[key] = self.constant(hint, array)
        return self._small[key]

    def alias(self, name: str, shape: Sequence[int]) -> str:
        """Name the bytes of the initializer `name` once more, as `shape`."""
        again = self.name(f"{name}.alias")
        if name in self._stored:
            return self._refer(again, self._stored[name], shape)
        inline = next(tensor for tensor in self._initializers if tensor.name == name)
        array = numpy_helper.to_array(inline).reshape(tuple(shape))
        self._initializers.append(numpy_helper.from_array(array, again))
        return again

    def _append(self, chunks: Sequence[AnyArray], element_type: int) -> Stored:
        start = math.ceil(self._data.tell() / PAGE_BYTES) * PAGE_BYTES
        self._data.seek(start)
        for chunk in chunks:
            little = chunk.astype(chunk.dtype.newbyteorder("<"), order="C", copy=False)
            self._data.write(little.reshape(-1).view(np.uint8).data)
        end = self._data.tell()
        return Stored(element_type=element_type, offset=start, nbytes=end - start)

    def _refer(self, name: str, stored: Stored, shape: Sequence[int]) -> str:
        tensor = TensorProto(
            name=name,
            data_type=stored.element_type,
            dims=shape,
            data_location=TensorProto.EXTERNAL,
        )
        places = {"location": self._location, "offset": stored.offset, "length": stored.nbytes}
        for key, value in places.items():
            tensor.external_data.add(key=key, value=str(value))
        self._initializers.append(tensor)
        self._stored[name] = stored
        return name

    def note(self, key: str, value: str) -> None:
        """Add an entry to the model's metadata."""
        self._notes[key] = value

    def save(self, path: Path, *, accuracy_level: int) -> None:
        """Write the graph with every `MatMulNBits` at this accuracy level (0 fp32, 4 int8)."""
        for node in self._nodes:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = accuracy_level
        used = {name for node in self._nodes for name in node.input}
        initializers = [tensor for tensor in self._initializers if tensor.name in used]
        graph = helper.make_graph(self._nodes, "decoder", self._inputs, self._outputs, initializers)
        model = helper.make_model(
            graph,
            producer_name="tidegate",
            ir_version=IR_VERSION,
            opset_imports=[
                helper.make_opsetid("", OPSET),
                helper.make_opsetid(CONTRIB, CONTRIB_OPSET),
            ],
        )
        helper.set_model_props(model, self._notes)
        path.write_bytes(model.SerializeToString(deterministic=True))
