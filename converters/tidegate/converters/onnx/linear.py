"""Linear layers and embedding tables as ONNX Runtime operators on an `OnnxGraph`.

A packed weight is stored once, as `MatMulNBits` reads it; `GatherBlockQuantized` reads the same
bytes under a flat shape. A dense weight stays [out, in], as in the checkpoint, for `FusedMatMul`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np
from onnx import TensorProto

from tidegate.converters.onnx.graph import CONTRIB, OnnxGraph
from tidegate.converters.stacking import stacked_bias, stacks
from tidegate.errors import ConversionError
from tidegate.model.architecture import Activation
from tidegate.model.ops import GatedMlp
from tidegate.model.packed import Array, DenseLinear, Linear, LowRankLinear, PackedLinear

BLOCK_SIZES = (128, 256, 64, 32, 16)
"""Group sizes whose 4- and 8-bit CPU kernels can use int8 activations; the first is preferred."""

INT8_ACTIVATIONS, FLOAT_ACTIVATIONS = 4, 0
"""`accuracy_level` of MatMulNBits; on a CPU 1, 2 and 3 are the same as 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredLinear:
    """Initializers of a weight: `scales` is None for a dense one, `zeros` for a symmetric one."""

    weight: str
    scales: str | None = None
    zeros: str | None = None

    @property
    def scaling(self) -> list[str]:
        """The operators' trailing inputs."""
        return [name for name in (self.scales, self.zeros) if name is not None]


def regrouped(linear: PackedLinear) -> PackedLinear:
    """The same weight in groups of a size that ONNX Runtime has; large groups are cut in equals.

    Raises:
        ConversionError: no size in `BLOCK_SIZES` divides the group size.
    """
    if linear.group_size in BLOCK_SIZES:
        return linear
    size = next((size for size in BLOCK_SIZES if linear.group_size % size == 0), None)
    if size is None:
        raise ConversionError(
            f"group_size = {linear.group_size}: MatMulNBits needs a multiple of {min(BLOCK_SIZES)}"
        )
    # Groups that hold nothing but padding are not allowed for.
    groups, times = -(-linear.inputs // size), linear.group_size // size
    values = linear.values.reshape(linear.outputs, -1, size * linear.bits // 8)
    zeros = linear.zeros
    return PackedLinear(
        values=np.ascontiguousarray(values[:, :groups]),
        scales=np.repeat(linear.scales, times, axis=1)[:, :groups],
        zeros=None if zeros is None else np.repeat(zeros, times, axis=1)[:, :groups],
        bias=linear.bias,
        inputs=linear.inputs,
        bits=linear.bits,
        group_size=size,
    )


def mergeable(weights: Sequence[Linear]) -> bool:
    """Whether weights that share an input can be rows of one operator."""
    if any(isinstance(weight, LowRankLinear) for weight in weights):
        return False
    return len(stacks(weights)) == 1


def emit_linear(graph: OnnxGraph, x: str, *weights: Linear) -> str:
    """`x @ w.T + bias`, the outputs of all `weights` (which are `mergeable`) side by side."""
    first = weights[0]
    if isinstance(first, LowRankLinear):
        return emit_linear(graph, emit_linear(graph, x, first.first), first.second)
    parts = [regrouped(w) if isinstance(w, PackedLinear) else w for w in weights]
    return emit_product(graph, x, store(graph, parts), parts)


def store(graph: OnnxGraph, weights: Sequence[Linear]) -> StoredLinear:
    """Stream the weights, stacked along their outputs, to the data file."""
    packed = [w for w in weights if isinstance(w, PackedLinear)]
    if not packed:
        dense = [w.weight for w in weights if isinstance(w, DenseLinear)]
        return StoredLinear(weight=graph.constant("weight", *dense))
    zeros = [zero for w in packed if (zero := w.packed_zeros()) is not None]
    return StoredLinear(
        weight=graph.constant("values", *[w.values for w in packed]),
        scales=_scales(graph, [w.scales for w in packed]),
        zeros=graph.constant("zeros", *zeros) if zeros else None,
    )


def _scales(graph: OnnxGraph, scales: Sequence[Array]) -> str:
    """Scales as the operators take them, float32, from float16 ones in the file.

    ONNX Runtime folds the cast when it loads the graph, so that it costs half the bytes and no
    time. Scales that a float16 cannot hold stay as they are.
    """
    halves = [part.astype(np.float16) for part in scales]
    if not all(np.array_equal(a, b) for a, b in zip(halves, scales, strict=True)):
        return graph.constant("scales", *scales)
    return graph.node("Cast", [graph.constant("scales", *halves)], to=TensorProto.FLOAT)


def emit_product(graph: OnnxGraph, x: str, stored: StoredLinear, weights: Sequence[Linear]) -> str:
    """The operator that multiplies `x` by weights which are stored already."""
    bias = _bias(graph, weights)
    first = weights[0]
    if not isinstance(first, PackedLinear):
        product = graph.node("FusedMatMul", [x, stored.weight], domain=CONTRIB, transB=1)
        return graph.node("Add", [product, bias]) if bias else product
    inputs = [x, stored.weight, *stored.scaling]
    if bias:
        inputs = [*inputs, *[""] * (5 - len(inputs)), bias]
    return graph.node(
        "MatMulNBits",
        inputs,
        domain=CONTRIB,
        K=first.inputs,
        N=sum(w.outputs for w in weights),
        bits=first.bits,
        block_size=first.group_size,
        accuracy_level=INT8_ACTIVATIONS,
    )


def _bias(graph: OnnxGraph, weights: Sequence[Linear]) -> str | None:
    bias = stacked_bias(weights)
    return None if bias is None else graph.constant("bias", bias)


def emit_gated_mlp(graph: OnnxGraph, x: str, mlp: GatedMlp, act: Activation) -> str:
    """`down(act(gate(x)) * up(x))`."""
    gated = emit_activation(graph, emit_linear(graph, x, mlp.gate), act)
    product = graph.node("Mul", [gated, emit_linear(graph, x, mlp.up)])
    return emit_linear(graph, product, mlp.down)


def emit_activation(graph: OnnxGraph, x: str, act: Activation) -> str:
    """The non-linearity `act`."""
    match act:
        case "silu":
            # x * sigmoid(alpha * x), one operator instead of two.
            return graph.node("QuickGelu", [x], domain=CONTRIB, alpha=1.0)
        case "relu":
            return graph.node("Relu", [x])
        case "gelu" | "gelu_tanh":
            return graph.node("Gelu", [x], approximate="tanh" if act == "gelu_tanh" else "none")
        case _:
            assert_never(act)


def emit_rows(graph: OnnxGraph, tokens: str, stored: StoredLinear, table: Linear) -> str:
    """The rows `tokens` of an embedding table, float32 [..., width]."""
    if not isinstance(table, PackedLinear):
        return graph.node("Gather", [stored.weight, tokens], axis=0)
    flat = graph.alias(stored.weight, (table.outputs, table.values[0].size))
    rows = graph.node(
        "GatherBlockQuantized",
        [flat, tokens, *stored.scaling],
        domain=CONTRIB,
        bits=table.bits,
        block_size=table.group_size,
        gather_axis=0,
        quantize_axis=1,
    )
    if table.groups * table.group_size == table.inputs:
        return rows
    bounds = [graph.integers(at) for at in (0, table.inputs, -1)]
    return graph.node("Slice", [rows, *bounds])
