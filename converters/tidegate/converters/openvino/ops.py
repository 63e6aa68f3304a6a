"""`OpenVinoOps`: the forward walk lowered to an OpenVINO graph that is paged from the start.

Inputs of the graph, for T tokens of B requests of which R want logits:

    input_ids, position_ids               int32 [T]      tokens of all requests, one after another
    past_lens                             int32 [B]      tokens that each already has in the cache
    subsequence_begins                    int32 [B + 1]  where each begins among the T tokens
    block_indices, block_indices_begins   int32 [...], [B + 1]   blocks of 32 tokens
    max_context_len                       int32, rank 0
    sampled                               int32 [R]      tokens whose logits are wanted
    key_cache.i, value_cache.i            layout and type chosen by the plugin when it compiles

Output `logits` float32 [R, V]. The attention operation is internal to OpenVINO and may change in
any release, so the version that wrote a graph is in its `rt_info` and no other minor may run it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset13 as op

from tidegate.converters.openvino import graph
from tidegate.converters.openvino.capped import CappedAttention
from tidegate.converters.openvino.experts import route
from tidegate.converters.openvino.export import Progress, emit_activation, write_model
from tidegate.converters.openvino.graph import Node
from tidegate.converters.openvino.linear import LinearLayers, Stored
from tidegate.converters.openvino.weights import ConstantFile
from tidegate.model.architecture import Activation, Architecture, AttentionSpec, Experts
from tidegate.model.ops import GatedMlp
from tidegate.model.packed import Array, Linear
from tidegate.model.rope import Rope
from tidegate.model.walk import Weights, decoder

_STEP_VECTORS = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")


class OpenVinoOps:
    """Implements `tidegate.model.ops.Ops`, emitting nodes; `model` closes the graph."""

    def __init__(self, arch: Architecture, constants: ConstantFile) -> None:
        self._arch = arch
        self._layers = LinearLayers(constants)
        self._ids = graph.parameter("input_ids", 1, ov.Type.i32)
        self._positions = graph.parameter("position_ids", 1, ov.Type.i32)
        self._sampled = graph.parameter("sampled", 1, ov.Type.i32)
        self._step = {name: graph.parameter(name, 1, ov.Type.i32) for name in _STEP_VECTORS}
        self._step["max_context_len"] = graph.parameter("max_context_len", 0, ov.Type.i32)
        self._caches: list[Node] = []
        self._angles: dict[Rope, tuple[Node, Node]] = {}
        self._table: Stored
        self._capped: CappedAttention | None = None

    def embed(self, table: Linear) -> Node:
        """See `Ops`. The rows are decompressed after they are gathered, whatever their bits."""
        self._table = self._layers.store_table(table)
        return self._layers.rows(self._table, self._ids)

    def linears(self, x: Node, weights: Sequence[Linear]) -> Sequence[Node]:
        """See `Ops`. Weights that agree are merged into one product."""
        return self._layers.products(x, weights)

    def rms_norm(self, x: Node, weight: Array, eps: float) -> Node:
        """See `Ops`."""
        return graph.rms_norm(x, weight, eps)

    def scale(self, x: Node, factor: float) -> Node:
        """See `Ops`."""
        return op.multiply(x, graph.scalar(np.float32(factor)))

    def clip(self, x: Node, limit: float) -> Node:
        """See `Ops`."""
        return op.clamp(x, -limit, limit)

    def softcap(self, x: Node, cap: float) -> Node:
        """See `Ops`."""
        return self.scale(op.tanh(self.scale(x, 1 / cap)), cap)

    def moe(
        self,
        x: Node,
        router: Linear,
        expert: Callable[[int], GatedMlp],
        experts: Experts,
        act: Activation,
    ) -> Node:
        """See `Ops` and `openvino_experts`."""
        (scores,) = self.linears(x, [router])
        routes = route(scores, experts)
        results = []
        for number, piece in enumerate(routes.pieces(x)):
            mlp = expert(number)
            results.append(self.gated_mlp(piece, mlp.gate, mlp.up, mlp.down, act))
        return routes.combined(results)

    def attention(self, q: Node, k: Node, v: Node, spec: AttentionSpec) -> Node:
        """See `Ops`. Adds the layer's two cache inputs to the graph."""
        if spec.rope is not None:
            angles = self._rotary_angles(spec.rope)
            q = graph.rotate(q, spec.heads, spec.head_size, angles)
            k = graph.rotate(k, spec.kv_heads, spec.head_size, angles)
        key = graph.parameter(f"key_cache.{spec.layer}", 4, ov.Type.dynamic)
        value = graph.parameter(f"value_cache.{spec.layer}", 4, ov.Type.dynamic)
        self._caches += [key, value]
        if spec.softcap is None:
            return graph.paged_attention(q, k, v, (key, value), self._step, spec)
        if self._capped is None:
            self._capped = CappedAttention(self._step, self._positions)
        written = graph.paged_attention(q, k, v, (key, value), self._capped.writing, spec)
        return self._capped.attend(q, (key, value), written, spec)

    def gated_mlp(self, x: Node, gate: Linear, up: Linear, down: Linear, act: Activation) -> Node:
        """See `Ops`. Gate and up are one product when they agree."""
        gated, lifted = self.linears(x, [gate, up])
        (result,) = self.linears(op.multiply(emit_activation(gated, act), lifted), [down])
        return result

    def add(self, x: Node, y: Node) -> Node:
        """See `Ops`."""
        return op.add(x, y)

    def gather_rows(self, x: Node) -> Node:
        """See `Ops`. The rows are the graph's input `sampled`."""
        return op.gather(x, self._sampled, graph.scalar(graph.ROWS))

    def head(self, x: Node, table: Linear) -> Node:
        """See `Ops`. A tied head reads the very constant of the embedding."""
        if self._arch.tied_head:
            return self._layers.product(x, self._table)
        return self._layers.product(x, self._layers.store(table))

    def model(self, logits: Node) -> Node:
        """The `openvino.Model` from all inputs to `logits`; it needs the constant file open."""
        result = op.result(logits)
        result.output(0).set_names({"logits"})
        inputs = [self._ids, self._positions, self._sampled, *self._step.values(), *self._caches]
        model = ov.Model([result], inputs, "tidegate")
        model.set_rt_info(openvino_version(), ["tidegate", "openvino"])
        model.set_rt_info(str(self._layers.smallest_group), ["tidegate", "smallest_group"])
        return model

    def _rotary_angles(self, rope: Rope) -> tuple[Node, Node]:
        """Cosine and sine, shared by all layers that rotate alike."""
        if rope not in self._angles:
            context = self._arch.context
            self._angles[rope] = graph.rotary_angles(self._positions, rope, context)
        return self._angles[rope]


def openvino_version() -> str:
    """The installed OpenVINO, such as `2026.4.1`; a graph runs on the same `year.minor` only."""
    return str(ov.__version__).partition("-")[0]


def export_openvino(
    arch: Architecture, weights: Weights, folder: Path, *, progress: Progress | None = None
) -> None:
    """Write `folder/model.xml` and `folder/model.bin`.

    Memory stays at about one weight: each goes to a scratch file in `folder` when it is made, which
    becomes `model.bin`.

    Args:
        arch: the model.
        weights: packed or dense, by role; written as they are, never rounded.
        folder: made if absent; files of those names are replaced.
        progress: told of every finished layer, then of the writing.

    Raises:
        ConversionError: OpenVINO cannot write the files, for example because the disk is full.
        OSError: the scratch file cannot be written.
    """

    def build(reported: Weights, constants: ConstantFile) -> Node:
        ops = OpenVinoOps(arch, constants)
        return ops.model(decoder(ops, arch, reported))

    write_model(build, weights, arch.layers, folder, progress)
