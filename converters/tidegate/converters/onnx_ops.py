"""`OnnxOps`: the walk as an ONNX graph in ONNX Runtime's fused operators.

Packed weights go in as they are, rotary positions and the KV cache live in `GroupQueryAttention`,
and a residual sum waits for the norm that follows it, to become one
`SkipSimplifiedLayerNormalization` with it. Inputs and outputs of the graph:

    input_ids              int64 [B, S]          tokens; past context and S > 1 need B = 1
    seqlens_k              int32 [B]             tokens of a row after the step, minus one
    total_sequence_length  int32 scalar          the most tokens that any row has after the step
    sampled                int64 [R]             rows of the flattened [B * S] that get logits
    past_key.i             float32 [B, K, C, H]  layer i; past_value.i alike
    logits                 float32 [R, V]
    present_key.i          float32 [B, K, C, H]  to be bound to the memory of past_key.i
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

import numpy as np
from onnx import TensorProto

from tidegate.converters.onnx_graph import CONTRIB, OnnxGraph
from tidegate.converters.onnx_linear import (
    FLOAT_ACTIVATIONS,
    INT8_ACTIVATIONS,
    StoredLinear,
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
from tidegate.model.packed import Array, Linear, PackedLinear
from tidegate.model.rope import Rope
from tidegate.model.walk import Weights, decoder

GRAPH, EXACT_GRAPH, DATA = "model.onnx", "model.exact.onnx", "model.onnx.data"
"""Two graphs over one data file: int8 activations, which is what ships, and float32 ones."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that a node of the graph computes."""

    name: str


@dataclass(frozen=True, slots=True)
class Sum:
    """A residual sum, computed by the next norm or when somebody else needs it."""

    left: str
    right: str


@dataclass(frozen=True, slots=True)
class Part:
    """One of the linears that were merged into the tensor `merged`."""

    merged: str
    index: int
    widths: tuple[int, ...]


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
        self._computed: dict[Sum | str, list[str]] = {}
        self._rotations: dict[tuple[Rope, int], list[str]] = {}
        self._table: StoredLinear | None = None
        graph.input("input_ids", TensorProto.INT64, ["B", "S"])
        graph.input("seqlens_k", TensorProto.INT32, ["B"])
        graph.input("total_sequence_length", TensorProto.INT32, [])
        graph.input("sampled", TensorProto.INT64, ["R"])

    def embed(self, table: Linear) -> Value:
        """See `Ops.embed`."""
        table = regrouped(table) if isinstance(table, PackedLinear) else table
        stored = store(self._graph, [table])
        # Kept by name for a tied head, so that the table is stored once.
        self._table = stored if self._arch.tied_head else None
        return Tensor(emit_rows(self._graph, "input_ids", stored, table))

    def linears(self, x: Value, weights: Sequence[Linear]) -> list[Value]:
        """See `Ops.linears`; packed weights of one format become one operator."""
        name = self._name(x)
        if len(weights) == 1 or not mergeable(weights):
            return [Tensor(emit_linear(self._graph, name, weight)) for weight in weights]
        merged = emit_linear(self._graph, name, *weights)
        widths = tuple(weight.outputs for weight in weights)
        return [Part(merged, index, widths) for index in range(len(weights))]

    def rms_norm(self, x: Value, weight: Array, eps: float) -> Value:
        """See `Ops.rms_norm`; it computes the sum that it normalises."""
        gamma = self._graph.constant("norm", weight)
        if not self._waits(x):
            return Tensor(
                self._graph.node(
                    "SimplifiedLayerNormalization",
                    [self._name(x), gamma],
                    axis=-1,
                    epsilon=eps,
                    stash_type=1,
                )
            )
        normed, total = self._graph.name("normed"), self._graph.name("residual")
        self._graph.node(
            "SkipSimplifiedLayerNormalization",
            [x.left, x.right, gamma],
            [normed, "", "", total],
            domain=CONTRIB,
            epsilon=eps,
        )
        self._computed[x] = [total]
        return Tensor(normed)

    def scale(self, x: Value, factor: float) -> Value:
        """See `Ops.scale`."""
        return Tensor(self._graph.node("Mul", [self._name(x), self._scalar(factor)]))

    def clip(self, x: Value, limit: float) -> Value:
        """See `Ops.clip`."""
        bounds = [self._scalar(-limit), self._scalar(limit)]
        return Tensor(self._graph.node("Clip", [self._name(x), *bounds]))

    def softcap(self, x: Value, cap: float) -> Value:
        """See `Ops.softcap`."""
        bent = self._graph.node("Tanh", [self._name(self.scale(x, 1 / cap))])
        return self.scale(Tensor(bent), cap)

    def _scalar(self, value: float) -> str:
        return self._graph.constant("scalar", np.array([value], np.float32))

    def moe(
        self,
        x: Value,
        router: Linear,
        expert: Callable[[int], GatedMlp],
        experts: Experts,
        act: Activation,
    ) -> Value:
        """See `Ops.moe`."""
        raise ConversionError("experts: ONNX Runtime's lowering has none yet")

    def attention(self, q: Value, k: Value, v: Value, spec: AttentionSpec) -> Value:
        """See `Ops.attention`; q, k and v of one merged operator are handed over packed."""
        _check_attention(spec)
        self._on_layer(spec.layer)
        rotation = ["", ""] if spec.rope is None else self._rotation(spec.rope, spec.head_size)
        attended = self._graph.name("attended")
        self._graph.node(
            "GroupQueryAttention",
            [
                *self._projections(q, k, v),
                *self._cache("past", self._graph.input, spec),
                "seqlens_k",
                "total_sequence_length",
                *rotation,
            ],
            [attended, *self._cache("present", self._graph.output, spec)],
            domain=CONTRIB,
            num_heads=spec.heads,
            kv_num_heads=spec.kv_heads,
            scale=spec.scale,
            do_rotary=int(spec.rope is not None),
        )
        return Tensor(attended)

    def _projections(self, q: Value, k: Value, v: Value) -> list[str]:
        if isinstance(q, Part) and [replace(q, index=index) for index in range(3)] == [q, k, v]:
            return [q.merged, "", ""]
        return [self._name(value) for value in (q, k, v)]

    def _cache(
        self,
        when: str,
        declare: Callable[[str, int, Sequence[int | str]], None],
        spec: AttentionSpec,
    ) -> list[str]:
        names = [f"{when}_{kind}.{spec.layer}" for kind in ("key", "value")]
        for name in names:
            declare(name, TensorProto.FLOAT, ["B", spec.kv_heads, "C", spec.head_size])
        return names

    def _rotation(self, rope: Rope, head_size: int) -> list[str]:
        """Cosines and sines, [context, H / 2]; layers that rotate alike share them."""
        if (rope, head_size) not in self._rotations:
            tables = rope.tables(np.arange(self._arch.context))
            self._rotations[rope, head_size] = [
                self._graph.constant(name, table.astype(np.float32))
                for name, table in zip(("cos", "sin"), tables, strict=True)
            ]
        return self._rotations[rope, head_size]

    def gated_mlp(self, x: Value, gate: Linear, up: Linear, down: Linear, act: Activation) -> Value:
        """See `Ops.gated_mlp`."""
        graph, name = self._graph, self._name(x)
        gated = self._activate(emit_linear(graph, name, gate), act)
        product = graph.node("Mul", [gated, emit_linear(graph, name, up)])
        return Tensor(emit_linear(graph, product, down))

    def _activate(self, x: str, act: Activation) -> str:
        if act == "silu":
            # x * sigmoid(alpha * x), one operator instead of two.
            return self._graph.node("QuickGelu", [x], domain=CONTRIB, alpha=1.0)
        approximate = "tanh" if act == "gelu_tanh" else "none"
        return self._graph.node("Gelu", [x], approximate=approximate)

    def add(self, x: Value, y: Value) -> Value:
        """See `Ops.add`; nothing is computed until a norm or somebody else asks for the sum."""
        return Sum(self._name(x), self._name(y))

    def gather_rows(self, x: Value) -> Value:
        """See `Ops.gather_rows`: the rows `sampled` of the flattened [B * S]."""
        if self._waits(x):
            return Sum(self._rows(x.left), self._rows(x.right))
        return Tensor(self._rows(self._name(x)))

    def _rows(self, x: str) -> str:
        shape = self._graph.constant("shape", np.array([-1, self._arch.width], np.int64))
        flat = self._graph.node("Reshape", [x, shape])
        return self._graph.node("Gather", [flat, "sampled"], axis=0)

    def head(self, x: Value, table: Linear) -> Value:
        """See `Ops.head`; a tied table is read from the embedding's bytes."""
        table = regrouped(table) if isinstance(table, PackedLinear) else table
        stored = store(self._graph, [table]) if self._table is None else self._table
        logits = emit_product(self._graph, self._name(x), stored, [table])
        self._graph.node("Identity", [logits], ["logits"])
        self._graph.output("logits", TensorProto.FLOAT, ["R", self._arch.vocab])
        return Tensor("logits")

    def _waits(self, x: Value) -> TypeGuard[Sum]:
        """Whether `x` is a sum that nothing has computed."""
        return isinstance(x, Sum) and x not in self._computed

    def _name(self, x: Value) -> str:
        """The tensor that holds `x`, computed by a plain operator if nothing has done it."""
        match x:
            case Tensor(name):
                return name
            case Sum(left, right):
                if x not in self._computed:
                    self._computed[x] = [self._graph.node("Add", [left, right])]
                return self._computed[x][0]
            case Part(merged, index, widths):
                if merged not in self._computed:
                    self._computed[merged] = self._split(merged, widths)
                return self._computed[merged][index]

    def _split(self, merged: str, widths: Sequence[int]) -> list[str]:
        names = [self._graph.name("part") for _ in widths]
        sizes = self._graph.constant("widths", np.array(widths, np.int64))
        self._graph.node("Split", [merged, sizes], names, axis=-1)
        return names


def _check_attention(spec: AttentionSpec) -> None:
    """Refuse what the CPU kernel of GroupQueryAttention cannot do."""
    multiple = 8 if spec.rope is None else 16
    if spec.head_size % multiple:
        raise ConversionError(
            f"head_size = {spec.head_size}: GroupQueryAttention needs a multiple of {multiple}"
        )
    if spec.heads % spec.kv_heads:
        raise ConversionError(f"kv_heads = {spec.kv_heads}: must divide the {spec.heads} heads")


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

    for name in (GRAPH, EXACT_GRAPH):
        (folder / name).unlink(missing_ok=True)
    with (folder / DATA).open("wb") as data:
        graph = OnnxGraph(data, DATA)
        decoder(OnnxOps(arch, graph, on_layer=report), arch, weights)
    graph.save(folder / EXACT_GRAPH, accuracy_level=FLOAT_ACTIVATIONS)
    graph.save(folder / GRAPH, accuracy_level=INT8_ACTIVATIONS)
    report(arch.layers)
