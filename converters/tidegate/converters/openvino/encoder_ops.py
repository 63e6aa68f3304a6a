"""`OpenVinoEncoderOps`: an encoder's walk lowered to an OpenVINO graph.

Texts are padded on the right to the longest. Values are [B * S, width], the form in which products
with packed weights fuse; attention and pooling see texts again and hide what is beyond a length.
All operations are public ones, so any OpenVINO from the one that wrote a graph on can run it.
Inputs and output of the graph:

    input_ids              int32 [B, S]
    lengths                int32 [B]            tokens of each text, at least 1
    embeddings or logits   float32 [B, outputs]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

import numpy as np
import openvino as ov
import openvino.opset13 as op

from tidegate.converters.openvino import graph
from tidegate.converters.openvino.export import Progress, emit_activation, write_model
from tidegate.converters.openvino.graph import Node
from tidegate.converters.openvino.linear import LinearLayers
from tidegate.converters.openvino.ops import openvino_version
from tidegate.converters.openvino.weights import ConstantFile
from tidegate.model.architecture import Activation
from tidegate.model.encoder import EncoderArchitecture, Pooling
from tidegate.model.packed import Array, Linear, dense_weight
from tidegate.model.walk import Weights, encoder

_TINY = np.float32(1e-12)
"""The least length that an embedding is divided by; see `EncoderOps.unit`."""

_SWAP = (0, 2, 1, 3)
"""Axes that turn [B, S, N, H] into [B, N, S, H], and back."""


class OpenVinoEncoderOps:
    """Implements `tidegate.model.ops.EncoderOps`, emitting nodes; `model` closes the graph."""

    def __init__(self, arch: EncoderArchitecture, constants: ConstantFile) -> None:
        """Declare the graph's inputs; weights go to `constants`."""
        self._arch, self._layers = arch, LinearLayers(constants)
        self._ids = graph.parameter("input_ids", 2, ov.Type.i32)
        self._lengths = graph.parameter("lengths", 1, ov.Type.i32)
        self._sizes = op.shape_of(self._ids, "i64")
        longest = op.gather(self._sizes, _index(1), _index(0))
        self._places = op.range(_index(0), longest, _index(1), "i32")
        # Whether a token is one of its text, [B, S].
        self._real = op.less(self._places, op.unsqueeze(self._lengths, graph.ints(1)))

    def embed(self, table: Linear) -> Node:
        """See `CommonOps.embed`."""
        return self._rows(table, op.reshape(self._ids, graph.ints(-1), False))

    def positions(self, table: Linear) -> Node:
        """See `EncoderOps.positions`."""
        places = op.reshape(op.broadcast(self._places, self._sizes), graph.ints(-1), False)
        return self._rows(table, places)

    def _rows(self, table: Linear, ids: Node) -> Node:
        return self._layers.rows(self._layers.store_table(table), ids)

    def token_types(self, table: Linear) -> Node:
        """See `EncoderOps.token_types`; one row, so it is stored as numbers."""
        return graph.vector(dense_weight(table)[0])

    def linears(self, x: Node, weights: Sequence[Linear]) -> list[Node]:
        """See `CommonOps.linears`. Weights that agree are merged into one product."""
        return self._layers.products(x, weights)

    def add(self, x: Node, y: Node) -> Node:
        """See `CommonOps.add`."""
        return op.add(x, y)

    def layer_norm(self, x: Node, weight: Array, bias: Array, eps: float) -> Node:
        """See `EncoderOps.layer_norm`."""
        normal = op.mvn(x, graph.ints(-1), True, eps, "inside_sqrt")
        return op.add(op.multiply(normal, graph.vector(weight)), graph.vector(bias))

    def full_attention(self, q: Node, k: Node, v: Node, heads: int, scale: float) -> Node:
        """See `EncoderOps.full_attention`; keys beyond a text's length are hidden."""
        split = [self._by_head(x, heads) for x in (q, k, v)]
        mask = op.unsqueeze(self._real, graph.ints(1, 2))
        factor = graph.scalar(np.float32(scale))
        attended = op.scaled_dot_product_attention(*split, mask, factor)
        tokens = op.transpose(attended, graph.ints(*_SWAP))
        return op.reshape(tokens, graph.ints(-1, self._arch.width), False)

    def _by_head(self, x: Node, heads: int) -> Node:
        """Rows [B * S, N * H] as [B, N, S, H]."""
        shape = op.concat([self._sizes, graph.ints(heads, self._arch.width // heads)], 0)
        return op.transpose(op.reshape(x, shape, False), graph.ints(*_SWAP))

    def mlp(self, x: Node, up: Linear, down: Linear, act: Activation) -> Node:
        """See `EncoderOps.mlp`."""
        (widened,) = self.linears(x, [up])
        (narrowed,) = self.linears(emit_activation(widened, act), [down])
        return narrowed

    def pool(self, x: Node, pooling: Pooling) -> Node:
        """See `EncoderOps.pool`: [B * S, width] becomes [B, width]."""
        shape = op.concat([self._sizes, graph.ints(self._arch.width)], 0)
        texts = op.reshape(x, shape, False)
        match pooling:
            case "cls":
                return op.gather(texts, _index(0), _index(1))
            case "mean":
                kept = op.select(op.unsqueeze(self._real, graph.ints(2)), texts, _zero())
                total = op.reduce_sum(kept, graph.ints(1), False)
                lengths = op.convert(op.unsqueeze(self._lengths, graph.ints(1)), "f32")
                return op.divide(total, lengths)
            case _:
                assert_never(pooling)

    def activate(self, x: Node, act: Activation) -> Node:
        """See `EncoderOps.activate`."""
        return emit_activation(x, act)

    def tanh(self, x: Node) -> Node:
        """See `EncoderOps.tanh`."""
        return op.tanh(x)

    def unit(self, x: Node) -> Node:
        """See `EncoderOps.unit`."""
        length = op.reduce_l2(x, graph.ints(-1), True)
        return op.divide(x, op.maximum(length, graph.scalar(_TINY)))

    def model(self, outputs: Node) -> Node:
        """The `openvino.Model` from the inputs to `outputs`; it needs the constant file open."""
        result = op.result(outputs)
        result.output(0).set_names({"logits" if self._arch.labels else "embeddings"})
        model = ov.Model([result], [self._ids, self._lengths], "tidegate")
        model.set_rt_info(openvino_version(), ["tidegate", "openvino"])
        model.set_rt_info(str(self._layers.smallest_group), ["tidegate", "smallest_group"])
        return model


def _index(value: int) -> Node:
    """An int64 of rank 0: an axis, a place."""
    return graph.scalar(np.int64(value))


def _zero() -> Node:
    return graph.scalar(np.float32(0))


def export_openvino_encoder(
    arch: EncoderArchitecture, weights: Weights, folder: Path, *, progress: Progress | None = None
) -> None:
    """Write an encoder as `folder/model.xml` and `folder/model.bin`.

    Arguments and errors are those of `tidegate.converters.openvino.ops.export_openvino`.
    """

    def build(reported: Weights, constants: ConstantFile) -> Node:
        ops = OpenVinoEncoderOps(arch, constants)
        return ops.model(encoder(ops, arch, reported))

    write_model(build, weights, arch.layers, folder, progress)
