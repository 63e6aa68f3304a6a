"""Further graphs over the weights of a finished ONNX target: int8 KV, and float16 throughout.

A variant is the shipped graph with other types. It reads the same data file, so it costs what its
nodes take: some hundred kilobytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tidegate.converters.onnx.attention import head_layout
from tidegate.converters.onnx.ops import GRAPH
from tidegate.converters.onnx.variant_names import FILES, Variant
from tidegate.errors import ConversionError
from tidegate.model.architecture import Architecture
from tidegate.model.packed import Array

if TYPE_CHECKING:
    from tidegate.converters.onnx.ranges import LayerRanges

INT8_STEPS = 127
"""The largest integer; -128 is left out, so that both signs reach as far."""

MARGIN = 1.5
"""How much further keys and values may reach than on calibration text. Steps get as much coarser,
which costs less than what is cut. Mean divergence in nats that int8 KV causes in the assistant's
edge model, without and with it: calibrated on 128 of its chats 0.0015 and 0.0004, on the text that
comes along, which is unlike them, 0.0114 and 0.0011; on 512 chats 0.0003 and 0.0005."""

HALF_REACH = 65_504 / 4
"""A float16 holds up to 65 504, and other text than the calibration's may reach further."""

_ATTENTION = "GroupQueryAttention"
_ATTENTION_INPUTS = 12
"""Of `GroupQueryAttention`, before the two of the scales."""
_LEAST_SCALE = 1e-8
"""Of a channel that is always zero, as those are that fill up a head."""


def write_variants(
    folder: Path,
    arch: Architecture,
    variants: Sequence[Variant],
    ranges: Sequence[LayerRanges],
) -> None:
    """Write variants of `model.onnx` beside it.

    Args:
        folder: a finished ONNX target.
        arch: its model.
        variants: which.
        ranges: of each layer, on calibration text.

    Raises:
        ConversionError: the model cannot be expressed so; names the variant and why.
    """
    makers: Mapping[Variant, Callable[..., None]] = {"int8kv": int8_kv, "fp16": float16}
    for variant in variants:
        model = onnx.load(str(folder / GRAPH), load_external_data=False)
        makers[variant](model, arch, ranges)
        (folder / FILES[variant]).write_bytes(model.SerializeToString(deterministic=True))


def int8_kv(model: onnx.ModelProto, arch: Architecture, ranges: Sequence[LayerRanges]) -> None:
    """Make a graph keep int8 keys and values: `round(x / scale)`, a scale for each channel.

    Scales are constants: what reaches further than `MARGIN` beyond the magnitudes seen is cut.
    """
    _set_cache_type(model.graph, TensorProto.INT8)
    for node in model.graph.node:
        if node.op_type != _ATTENTION:
            continue
        layer = int(node.input[3].removeprefix("past_key."))
        node.input.extend([""] * (_ATTENTION_INPUTS - len(node.input)))
        for kind, scales in _scales(arch, layer, ranges[layer]).items():
            name = f"{kind}_scale.{layer}"
            model.graph.initializer.append(numpy_helper.from_array(scales, name))
            node.input.append(name)
        node.attribute.extend(
            [
                helper.make_attribute("k_quant_type", "PER_CHANNEL"),
                helper.make_attribute("v_quant_type", "PER_CHANNEL"),
                helper.make_attribute("kv_cache_bit_width", 8),
            ]
        )


def _scales(arch: Architecture, layer: int, ranges: LayerRanges) -> dict[str, Array]:
    """Scales [1, K, 1, H] of keys and values, the channels where the operator has them."""
    layout = head_layout(arch.head_size, arch.kind(layer).rope)
    more = ((0, 0), (0, layout.size - arch.head_size))
    keys, values = (np.pad(one, more) for one in (ranges.keys, ranges.values))
    if layout.order is not None:
        keys = keys[:, list(layout.order)]
    return {
        kind: np.maximum(peaks * (MARGIN / INT8_STEPS), _LEAST_SCALE).astype(np.float32)[
            None, :, None
        ]
        for kind, peaks in (("key", keys), ("value", values))
    }


def float16(model: onnx.ModelProto, arch: Architecture, ranges: Sequence[LayerRanges]) -> None:
    """Make a graph compute in float16 with float16 KV; its logits are float32.

    Float32 constants go through a cast, which a runtime does once when it loads the graph; scales
    are float16 in the file already.

    Raises:
        ConversionError: an activation, or a scale, is more than a float16 holds.
    """
    for layer, one in enumerate(ranges):
        if not one.activations <= HALF_REACH:
            raise ConversionError(
                f"graphs: fp16: activations of layer {layer} reach {one.activations:.0f} on "
                f"calibration text: at most {HALF_REACH:.0f} is safe in float16"
            )
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.name.startswith("scales.") and tensor.data_type == TensorProto.FLOAT:
            raise ConversionError(f"graphs: fp16: {tensor.name}: scales are not float16 numbers")
    _set_cache_type(graph, TensorProto.FLOAT16)
    renamed = dict(_halves(graph))
    nodes = [node for node in graph.node if not _widens(node)]
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        if list(node.output) == ["logits"]:
            node.op_type = "Cast"
            node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    casts = [
        helper.make_node("Cast", [name], [half], name=half, to=TensorProto.FLOAT16)
        for name, half in renamed.items()
        if half.endswith(".half")
    ]
    del graph.node[:]
    graph.node.extend([*casts, *nodes])


def _halves(graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
    """What float32 constants, and halves that were widened, are called as halves."""
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            yield tensor.name, f"{tensor.name}.half"
    for node in graph.node:
        if _widens(node):
            yield node.output[0], node.input[0]


def _widens(node: onnx.NodeProto) -> bool:
    """Whether a node does nothing but make float32 numbers of float16 constants."""
    return node.op_type == "Cast" and any(one.i == TensorProto.FLOAT for one in node.attribute)


def _set_cache_type(graph: onnx.GraphProto, element_type: int) -> None:
    for value in (*graph.input, *graph.output):
        if value.name.startswith(("past_", "present_")):
            value.type.tensor_type.elem_type = element_type
