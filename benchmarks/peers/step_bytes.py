"""How many bytes of weights one decode step reads, from the files that an engine runs.

All constants count but the ones that only a gather takes rows of: the table of a model whose head
is a matrix of its own. The share of the memory bandwidth that an engine reaches follows from this.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as Xml
from collections import defaultdict
from pathlib import Path

import onnx

_UNPACKING = {"Convert", "Subtract", "Multiply", "Reshape"}
"""What stands between packed weights and their use."""
_ROW_READERS = {"Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding"}
"""Operators of ONNX that read rows of a table: of embeddings, or of the rotation's angles."""
_ONNX_BITS = {"FLOAT": 32, "FLOAT16": 16, "BFLOAT16": 16, "INT64": 64, "INT32": 32, "DOUBLE": 64}


def openvino_step_bytes(path: Path) -> int:
    """Of an OpenVINO model file, `*.xml`."""
    root = Xml.parse(path).getroot()
    kinds = {one.attrib["id"]: one.attrib["type"] for one in root.iter("layer")}
    readers: dict[str, list[str]] = defaultdict(list)
    for edge in root.iter("edge"):
        readers[edge.attrib["from-layer"]].append(edge.attrib["to-layer"])

    def uses(layer: str) -> set[str]:
        found: set[str] = set()
        for reader in readers[layer]:
            found |= uses(reader) if kinds[reader] in _UNPACKING else {kinds[reader]}
        return found

    total = 0
    for layer in root.iter("layer"):
        data = layer.find("data")
        if data is not None and kinds[layer.attrib["id"]] == "Const":
            rows_only = uses(layer.attrib["id"]) == {"Gather"}
            total += 0 if rows_only else int(data.attrib["size"])
    return total


def onnx_step_bytes(path: Path) -> int:
    """Of an ONNX model file."""
    graph = onnx.load(str(path), load_external_data=False).graph
    users: dict[str, set[str]] = defaultdict(set)
    for node in graph.node:
        for name in node.input:
            users[name].add(node.op_type)
    return sum(
        _tensor_bytes(one) for one in graph.initializer if not users[one.name] <= _ROW_READERS
    )


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    bits = _ONNX_BITS.get(onnx.TensorProto.DataType.Name(tensor.data_type), 8)
    return math.prod(tensor.dims) * bits // 8


def folder_bytes(folder: Path) -> int:
    """Of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
