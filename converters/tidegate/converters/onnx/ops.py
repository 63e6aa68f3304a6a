"""`OnnxOps`: the walk as an ONNX graph in ONNX Runtime's fused operators.

Packed weights go in as they are, rotary positions and the KV cache live in `GroupQueryAttention`,
and a residual sum waits for the norm that follows it, to become one
`SkipSimplifiedLayerNormalization` with it. Factors wait too, and most of them cancel in a norm.
Inputs and outputs of the graph:

    input_ids              int64 [B, S]          tokens; past context and S > 1 need B = 1
    seqlens_k              int32 [B]             tokens of a row after the step, minus one
    total_sequence_length  int32 scalar          the most tokens that any row has after the step
    sampled                int64 [R]             rows of the flattened [B * S] that get logits
    past_key.i             float32 [B, K, C, H]  layer i; past_value.i alike. H is the head size
                                                 that the attention operator has, at least the
                                                 model's (see `attention`)
    logits                 float32 [R, V]
    present_key.i          float32 [B, K, C, H]  to be bound to the memory of past_key.i
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

from onnx import TensorProto

from tidegate.converters.onnx.attention import emit_attention, head_layout, is_plain, rotation
from tidegate.converters.onnx.experts import emit_experts
from tidegate.converters.onnx.graph import CONTRIB, OnnxGraph
from tidegate.converters.onnx.linear import (
    FLOAT_ACTIVATIONS,
    INT8_ACTIVATIONS,
    StoredLinear,
    emit_gated_mlp,
    emit_linear,
    emit_product,
    emit_rows,
    mergeable,
    regrouped,
    store,
)
from tidegate.errors import ConversionError
from tidegate.model.architecture import Activation, Architecture, AttentionSpec, Experts
from tidegate.model.ops import GatedMlp
from tidegate.model.packed import Array, Linear, LowRankLinear, PackedLinear
from tidegate.model.rope import Rope
from tidegate.model.walk import Weights, decoder

GRAPH, EXACT_GRAPH, DATA = "model.onnx", "model.exact.onnx", "model.onnx.data"
"""Two graphs over one data file: int8 activations, which is what ships, and float32 ones."""

RESIDUAL = "tidegate.residual."
"""Metadata key, with a layer's number, of the residual stream behind it: `tensor factor`."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """`factor` times a tensor [..., width] that a node of the graph computes."""

    name: str
    width: int
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Sum:
    """`factor` times a residual sum, computed by the next norm or when somebody else needs it."""

    left: str
    right: str
    width: int
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Part:
    """One of the linears that were merged into the tensor `merged`."""

    merged: str
    index: int
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.widths[self.index]


Value = Tensor | Sum | Part


class OnnxOps:
    """`tidegate.model.ops.Ops[Value]` that appends to an `OnnxGraph`."""

    def __init__(
        self,
        arch: Architecture,
        graph: OnnxGraph,
        *,
        on_layer: Callable[[int], None] = lambda layer: None,
    ) -> None:
        """Declare the graph's inputs; `on_layer` is told each layer as it begins."""
        self._arch, self._graph, self._on_layer = arch, graph, on_layer
        self._computed: dict[object, str] = {}
        self._rotations: dict[tuple[Rope, int], list[str]] = {}
        self._table: StoredLinear | None = None
        self._streams: dict[int, Value] = {}
        graph.input("input_ids", TensorProto.INT64, ["B", "S"])
        graph.input("seqlens_k", TensorProto.INT32, ["B"])
        graph.input("total_sequence_length", TensorProto.INT32, [])
        graph.input("sampled", TensorProto.INT64, ["R"])

    def embed(self, table: Linear) -> Value:
        """See `Ops.embed`."""
        if isinstance(table, LowRankLinear):
            raise ConversionError("embed: a table cannot be looked up as a product of two")
        table = regrouped(table) if isinstance(table, PackedLinear) else table
        stored = store(self._graph, [table])
        # Kept by name for a tied head, so that the table is stored once.
        self._table = stored if self._arch.tied_head else None
        return Tensor(emit_rows(self._graph, "input_ids", stored, table), table.inputs)

    def linears(self, x: Value, weights: Sequence[Linear]) -> list[Value]:
        """See `Ops.linears`; weights of one format become one operator."""
        products = [weight for weight in weights if isinstance(weight, LowRankLinear)]
        if len(products) == len(weights) > 1:
            inner = self.linears(x, [weight.first for weight in products])
            pairs = zip(inner, products, strict=True)
            return [self._linear(value, weight.second) for value, weight in pairs]
        if len(weights) == 1 or not mergeable(weights):
            return [self._linear(x, weight) for weight in weights]
        merged = emit_linear(self._graph, self._name(x), *weights)
        widths = tuple(weight.outputs for weight in weights)
        return [Part(merged, index, widths) for index in range(len(weights))]

    def _linear(self, x: Value, weight: Linear) -> Tensor:
        return Tensor(emit_linear(self._graph, self._name(x), weight), weight.outputs)

    def rms_norm(self, x: Value, weight: Array, eps: float) -> Value:
        """See `Ops.rms_norm`; it computes the sum that it normalises.

        A factor of the input changes nothing but what `eps` is small against, so it costs nothing.
        Runs shorter than the row, such as heads, are rows of a view.
        """
        if not isinstance(x, Part):
            eps, x = eps / x.factor**2, replace(x, factor=1.0)
        gamma = self._graph.constant("norm", weight)
        if self._waits(x):
            normed, total = self._graph.name("normed"), self._graph.name("residual")
            self._graph.node(
                "SkipSimplifiedLayerNormalization",
                [x.left, x.right, gamma],
                [normed, "", "", total],
                domain=CONTRIB,
                epsilon=eps,
            )
            self._computed[x.left, x.right] = total
            return Tensor(normed, x.width)
        name, whole = self._name(x), len(weight) == x.width
        if not whole:
            runs = self._graph.integers(0, 0, x.width // len(weight), len(weight))
            name = self._graph.node("Reshape", [name, runs])
        norm = "SimplifiedLayerNormalization"
        normed = self._graph.node(norm, [name, gamma], axis=-1, epsilon=eps, stash_type=1)
        if not whole:
            normed = self._graph.node("Reshape", [normed, self._graph.integers(0, 0, x.width)])
        return Tensor(normed, x.width)

    def scale(self, x: Value, factor: float) -> Value:
        """See `Ops.scale`; the factor is multiplied in by whoever cannot do without.

        A residual stream keeps the factor of what is added to it, and norms do not see it, so of
        all the scales between the embedding and the head one multiplication is left.
        """
        if factor <= 0:
            scaled = self._graph.node("Mul", [self._name(x), self._graph.scalar(factor)])
            return Tensor(scaled, x.width)
        if isinstance(x, Part):
            return Tensor(self._name(x), x.width, factor)
        return replace(x, factor=x.factor * factor)

    def clip(self, x: Value, limit: float) -> Value:
        """See `Ops.clip`; merged linears are cut together."""
        bounds = [self._graph.scalar(-limit), self._graph.scalar(limit)]
        if not isinstance(x, Part):
            return Tensor(self._graph.node("Clip", [self._name(x), *bounds]), x.width)
        key = ("clip", x.merged, limit)
        if key not in self._computed:
            self._computed[key] = self._graph.node("Clip", [x.merged, *bounds])
        return replace(x, merged=self._computed[key])

    def softcap(self, x: Value, cap: float) -> Value:
        """See `Ops.softcap`."""
        bent = self._graph.node("Tanh", [self._name(self.scale(x, 1 / cap))])
        return Tensor(bent, x.width, cap)

    def moe(
        self,
        x: Value,
        router: Linear,
        expert: Callable[[int], GatedMlp],
        experts: Experts,
        act: Activation,
    ) -> Value:
        """See `Ops.moe`; what it costs says `experts`."""
        mixed = emit_experts(self._graph, self._name(x), router, expert, experts, act)
        return Tensor(mixed, x.width)

    def attention(self, q: Value, k: Value, v: Value, spec: AttentionSpec) -> Value:
        """See `Ops.attention`; q, k and v of one merged operator are handed over packed."""
        self._on_layer(spec.layer)
        if is_plain(spec) and isinstance(q, Part) and _are_one(q, [q, k, v]):
            projections = [q.merged, "", ""]
        else:
            projections = [self._name(value) for value in (q, k, v)]
        attended = emit_attention(self._graph, projections, spec, self._rotation(spec))
        return Tensor(attended, spec.heads * spec.head_size)

    def _rotation(self, spec: AttentionSpec) -> list[str]:
        """Names of cosines and sines [context, half]; layers that rotate alike share them."""
        if spec.rope is None:
            return ["", ""]
        half = head_layout(spec.head_size, spec.rope).half
        if (spec.rope, half) not in self._rotations:
            tables = rotation(spec.rope, self._arch.context, half)
            self._rotations[spec.rope, half] = [
                self._graph.constant(name, *blocks)
                for name, blocks in zip(("cos", "sin"), tables, strict=True)
            ]
        return self._rotations[spec.rope, half]

    def gated_mlp(self, x: Value, gate: Linear, up: Linear, down: Linear, act: Activation) -> Value:
        """See `Ops.gated_mlp`."""
        mlp = GatedMlp(gate=gate, up=up, down=down)
        return Tensor(emit_gated_mlp(self._graph, self._name(x), mlp, act), down.outputs)

    def add(self, x: Value, y: Value) -> Value:
        """See `Ops.add`; nothing is computed until a norm or somebody else asks for the sum."""
        mine, factor = (1.0 if isinstance(value, Part) else value.factor for value in (x, y))
        x = x if mine == factor else Tensor(self._name(self.scale(x, 1 / factor)), x.width, factor)
        return Sum(self._unscaled(x), self._unscaled(y), x.width, factor)

    def gather_rows(self, x: Value) -> Value:
        """See `Ops.gather_rows`: the rows `sampled` of the flattened [B * S]."""
        if self._waits(x):
            return replace(x, left=self._rows(x.left, x.width), right=self._rows(x.right, x.width))
        return Tensor(self._rows(self._name(x), x.width), x.width)

    def _rows(self, x: str, width: int) -> str:
        flat = self._graph.node("Reshape", [x, self._graph.integers(-1, width)])
        return self._graph.node("Gather", [flat, "sampled"], axis=0)

    def head(self, x: Value, table: Linear) -> Value:
        """See `Ops.head`; a tied table is read from the embedding's bytes."""
        if self._table is None or isinstance(table, LowRankLinear):
            return self._linear(x, table)
        table = regrouped(table) if isinstance(table, PackedLinear) else table
        product = emit_product(self._graph, self._name(x), self._table, [table])
        return Tensor(product, table.outputs)

    def behind_layer(self, layer: int, x: Value) -> None:
        """Note the residual stream behind a layer; see `finish`."""
        self._streams[layer] = x

    def finish(self, logits: Value) -> None:
        """Make the walk's result the graph's output, and note where the residual stream is.

        The model's metadata name the tensor behind each layer but the last (whose rows are
        gathered first), and its factor, so that an evaluation can look inside; running the graph
        costs no more.
        """
        for layer, x in self._streams.items():
            if not self._waits(x):
                factor = 1.0 if isinstance(x, Part) else x.factor
                self._graph.note(f"{RESIDUAL}{layer}", f"{self._unscaled(x)} {factor!r}")
        self._graph.node("Identity", [self._name(logits)], ["logits"])
        self._graph.output("logits", TensorProto.FLOAT, ["R", logits.width])

    def _waits(self, x: Value) -> TypeGuard[Sum]:
        """Whether `x` is a sum that nothing has computed."""
        return isinstance(x, Sum) and (x.left, x.right) not in self._computed

    def _name(self, x: Value) -> str:
        """The tensor that holds `x`, computed by plain operators if nothing has done it."""
        name = self._unscaled(x)
        if isinstance(x, Part) or x.factor == 1:
            return name
        key = ("scaled", name, x.factor)
        if key not in self._computed:
            self._computed[key] = self._graph.node("Mul", [name, self._graph.scalar(x.factor)])
        return self._computed[key]

    def _unscaled(self, x: Value) -> str:
        """The tensor that holds `x` but for its factor."""
        match x:
            case Tensor(name):
                return name
            case Sum(left, right):
                if (left, right) not in self._computed:
                    self._computed[left, right] = self._graph.node("Add", [left, right])
                return self._computed[left, right]
            case Part(merged, index, widths):
                if (merged, index) not in self._computed:
                    names = [self._graph.name("part") for _ in widths]
                    sizes = self._graph.integers(*widths)
                    self._graph.node("Split", [merged, sizes], names, axis=-1)
                    self._computed.update({(merged, i): name for i, name in enumerate(names)})
                return self._computed[merged, index]


def _are_one(first: Part, values: Sequence[Value]) -> bool:
    """Whether `values` are all the parts of a merged tensor, in order."""
    return list(values) == [replace(first, index=index) for index in range(len(first.widths))]


def export_onnx(
    arch: Architecture,
    weights: Weights,
    folder: Path,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write a decoder as `model.onnx`, `model.exact.onnx` and their common `model.onnx.data`.

    Weights are asked for one at a time and written at once; the graphs come last, so a folder
    with a graph in it is complete.

    Args:
        arch: the model; the rotary table is as long as its `context`.
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
        ops = OnnxOps(arch, graph, on_layer=report)
        ops.finish(decoder(ops, arch, weights, ops.behind_layer))

    write_graphs(folder, emit)
    report(arch.layers)


def write_graphs(folder: Path, emit: Callable[[OnnxGraph], None]) -> None:
    """Write what `emit` puts into a graph as the three files of an ONNX target.

    The graphs come last, so a folder with a graph in it is complete.
    """
    for name in (GRAPH, EXACT_GRAPH):
        (folder / name).unlink(missing_ok=True)
    with (folder / DATA).open("wb") as data:
        graph = OnnxGraph(data, DATA)
        emit(graph)
    graph.save(folder / EXACT_GRAPH, accuracy_level=FLOAT_ACTIVATIONS)
    graph.save(folder / GRAPH, accuracy_level=INT8_ACTIVATIONS)
