"""`OnnxEncoderOps`: an encoder's walk as an ONNX graph in ONNX Runtime's fused operators.

Texts are padded on the right to the longest; attention and pooling look at the lengths, so what
the padding holds does not matter as long as it is a token. A residual sum waits for the norm that
follows it, to become one `SkipLayerNormalization` with it. Inputs and output of the graph:

    input_ids              int64 [B, S]
    lengths                int32 [B]            tokens of each text, at least 1
    embeddings or logits   float32 [B, outputs]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import numpy as np
from onnx import TensorProto

from tidegate.converters.onnx.graph import CONTRIB, OnnxGraph
from tidegate.converters.onnx.linear import (
    emit_activation,
    emit_linear,
    emit_rows,
    mergeable,
    regrouped,
    store,
)
from tidegate.converters.onnx.ops import write_graphs
from tidegate.errors import ConversionError
from tidegate.model.architecture import Activation
from tidegate.model.encoder import EncoderArchitecture, Pooling
from tidegate.model.packed import Array, Linear, LowRankLinear, PackedLinear, dense_weight
from tidegate.model.walk import Weights, encoder

_TINY = 1e-12
"""The least length that an embedding is divided by; see `EncoderOps.unit`."""

_HIDDEN = float(np.finfo(np.float32).min)
"""Added to the scores of padding; the operator's own -10000 a score could outweigh."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """A tensor of the graph, or the sum of two that nothing has computed yet."""

    name: str
    plus: str | None = None
    shared: bool = False
    """Without the batch's dimension: the same for all texts, [S, width] or [1, width]."""


class OnnxEncoderOps:
    """`tidegate.model.ops.EncoderOps[Value]` that appends to an `OnnxGraph`."""

    def __init__(
        self,
        arch: EncoderArchitecture,
        graph: OnnxGraph,
        *,
        on_layer: Callable[[int], None] = lambda layer: None,
    ) -> None:
        """Declare the graph's inputs; `on_layer` is told each layer as it begins."""
        self._arch, self._graph, self._on_layer = arch, graph, on_layer
        self._layers = 0
        graph.input("input_ids", TensorProto.INT64, ["B", "S"])
        graph.input("lengths", TensorProto.INT32, ["B"])
        whole = graph.node("Shape", ["input_ids"], start=1)
        self._longest = graph.node("Squeeze", [whole])

    def embed(self, table: Linear) -> Value:
        """See `CommonOps.embed`."""
        return Value(name=self._rows("input_ids", table))

    def positions(self, table: Linear) -> Value:
        """See `EncoderOps.positions`."""
        return Value(name=self._rows(self._range(TensorProto.INT64), table), shared=True)

    def token_types(self, table: Linear) -> Value:
        """See `EncoderOps.token_types`; one row, so it is stored as numbers."""
        return Value(name=self._graph.constant("type", dense_weight(table)[:1]), shared=True)

    def _rows(self, tokens: str, table: Linear) -> str:
        if isinstance(table, LowRankLinear):
            raise ConversionError("a low-rank table: ONNX Runtime's lowering has none")
        table = regrouped(table) if isinstance(table, PackedLinear) else table
        return emit_rows(self._graph, tokens, store(self._graph, [table]), table)

    def _number(self, value: int) -> str:
        """An int64 of rank 0."""
        return self._graph.node("Squeeze", [self._graph.integers(value)])

    def _range(self, element_type: int) -> str:
        """0, 1, 2, ... up to the longest text's last token, [S]."""
        graph = self._graph
        counted = graph.node("Range", [self._number(0), self._longest, self._number(1)])
        if element_type == TensorProto.INT64:
            return counted
        return graph.node("Cast", [counted], to=element_type)

    def linears(self, x: Value, weights: Sequence[Linear]) -> list[Value]:
        """See `CommonOps.linears`; weights of one format become one operator."""
        graph, name = self._graph, self._name(x)
        if len(weights) == 1 or not mergeable(weights):
            return [Value(name=emit_linear(graph, name, weight)) for weight in weights]
        parts = [graph.name("part") for _ in weights]
        widths = graph.integers(*[weight.outputs for weight in weights])
        graph.node("Split", [emit_linear(graph, name, *weights), widths], parts, axis=-1)
        return [Value(name=part) for part in parts]

    def add(self, x: Value, y: Value) -> Value:
        """See `CommonOps.add`; a sum of two batches waits for a norm or for somebody else."""
        if x.shared or y.shared:
            return Value(
                name=self._graph.node("Add", [self._name(x), self._name(y)]),
                shared=x.shared and y.shared,
            )
        return Value(name=self._name(x), plus=self._name(y))

    def layer_norm(self, x: Value, weight: Array, bias: Array, eps: float) -> Value:
        """See `EncoderOps.layer_norm`; it computes the sum that it normalises."""
        graph = self._graph
        affine = [graph.constant("norm", weight), graph.constant("norm_bias", bias)]
        if x.plus is None:
            inputs = [x.name, *affine]
            return Value(name=graph.node("LayerNormalization", inputs, axis=-1, epsilon=eps))
        inputs = [x.name, x.plus, *affine]
        return Value(name=graph.node("SkipLayerNormalization", inputs, domain=CONTRIB, epsilon=eps))

    def full_attention(self, q: Value, k: Value, v: Value, heads: int, scale: float) -> Value:
        """See `EncoderOps.full_attention`; keys beyond a text's length are hidden."""
        self._on_layer(self._layers)
        self._layers += 1
        attended = self._graph.node(
            "MultiHeadAttention",
            [*[self._name(x) for x in (q, k, v)], "", "lengths"],
            domain=CONTRIB,
            num_heads=heads,
            scale=scale,
            mask_filter_value=_HIDDEN,
        )
        return Value(name=attended)

    def mlp(self, x: Value, up: Linear, down: Linear, act: Activation) -> Value:
        """See `EncoderOps.mlp`."""
        graph = self._graph
        widened = emit_activation(graph, emit_linear(graph, self._name(x), up), act)
        return Value(name=emit_linear(graph, widened, down))

    def pool(self, x: Value, pooling: Pooling) -> Value:
        """See `EncoderOps.pool`: [B, S, width] becomes [B, width]."""
        graph, name = self._graph, self._name(x)
        match pooling:
            case "cls":
                return Value(name=graph.node("Gather", [name, self._number(0)], axis=1))
            case "mean":
                shares = graph.node("Unsqueeze", [self._shares(), graph.integers(1)])
                mean = graph.node("MatMul", [shares, name])
                return Value(name=graph.node("Squeeze", [mean, graph.integers(1)]))
            case _:
                assert_never(pooling)

    def _shares(self) -> str:
        """What each token counts in its text's mean, [B, S]: 1 / length, or 0 for padding."""
        graph = self._graph
        lengths = graph.node("Unsqueeze", ["lengths", graph.integers(1)])
        real = graph.node("Less", [self._range(TensorProto.INT32), lengths])
        numbers = [graph.node("Cast", [x], to=TensorProto.FLOAT) for x in (real, lengths)]
        return graph.node("Div", numbers)

    def activate(self, x: Value, act: Activation) -> Value:
        """See `EncoderOps.activate`."""
        return Value(name=emit_activation(self._graph, self._name(x), act))

    def tanh(self, x: Value) -> Value:
        """See `EncoderOps.tanh`."""
        return Value(name=self._graph.node("Tanh", [self._name(x)]))

    def unit(self, x: Value) -> Value:
        """See `EncoderOps.unit`."""
        graph, name = self._graph, self._name(x)
        length = graph.node("ReduceL2", [name, graph.integers(-1)], keepdims=1)
        floor = graph.node("Max", [length, graph.scalar(_TINY)])
        return Value(name=graph.node("Div", [name, floor]))

    def finish(self, outputs: Value) -> None:
        """Make the walk's result the graph's output."""
        name = output_name(self._arch)
        self._graph.node("Identity", [self._name(outputs)], [name])
        self._graph.output(name, TensorProto.FLOAT, ["B", self._arch.outputs])

    def _name(self, x: Value) -> str:
        """The tensor that holds `x`, summed by a plain operator if no norm did it."""
        return x.name if x.plus is None else self._graph.node("Add", [x.name, x.plus])


def output_name(arch: EncoderArchitecture) -> str:
    """What the graph's output is called: `logits` of a classifier, else `embeddings`."""
    return "logits" if arch.labels else "embeddings"


def export_onnx_encoder(
    arch: EncoderArchitecture,
    weights: Weights,
    folder: Path,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write an encoder as `model.onnx`, `model.exact.onnx` and their common `model.onnx.data`.

    As `tidegate.converters.onnx.ops.export_onnx` does for a decoder.

    Args:
        arch: the model.
        weights: by role, packed or dense.
        folder: an existing directory; files of the same names are replaced.
        progress: called with ("layers", done, total).

    Raises:
        ConversionError: the model needs what the operators do not have; the message names it.
        OSError: a file cannot be written.
    """

    def report(done: int) -> None:
        if progress is not None:
            progress("layers", done, arch.layers)

    def emit(graph: OnnxGraph) -> None:
        ops = OnnxEncoderOps(arch, graph, on_layer=report)
        ops.finish(encoder(ops, arch, weights))

    write_graphs(folder, emit)
    report(arch.layers)
