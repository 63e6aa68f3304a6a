"""A mixture of experts as plain operators: every expert multiplies the tokens that chose it.

The (token, choice) pairs are sorted by expert, split into one run of rows for each, and gathered
back where they came from. An expert that nobody chose multiplies no rows, which its five operators
return from at once: 0.2 ms a layer and step with 64 experts, little with 8. The work is otherwise
that of the chosen experts.

`QMoE`, the one fused operator that there is, was measured beside it: 64 experts of 1024 x 512 in
4 bits, 8 chosen, int8 activations, milliseconds of one EPYC core for 1, 4, 32 and 256 tokens:

    QMoE          0.26  2.0  10.9  62.8        of 2048 x 1024:   2.0  8.5  35.2  212
    as here       0.46  2.4  10.9  61.6                          2.7  9.2  35.5  203

An `If` around every expert saves nothing (0.52 and, with 32 tokens, 11.6): leaving a branch costs
what five operators on no rows do.

`QMoE` has no 8-bit kernel that keeps float32 activations, no gated activation but SwiGLU, and wants
all experts of a layer in one tensor and one format, so the plain operators would be needed anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from tidegate.converters.onnx.graph import OnnxGraph
from tidegate.converters.onnx.linear import emit_gated_mlp, emit_linear
from tidegate.model.architecture import Activation, Experts
from tidegate.model.ops import GatedMlp
from tidegate.model.packed import Linear


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sorted:
    """The T * chosen pairs of a token and an expert, in the order of the experts."""

    tokens: str
    """int64 [T * chosen]: the token of each pair."""
    counts: str
    """int64 [experts]: how many pairs each expert has."""
    places: str
    """int64 [T * chosen]: where each pair is, taken token by token."""


def emit_experts(
    graph: OnnxGraph,
    x: str,
    router: Linear,
    expert: Callable[[int], GatedMlp],
    experts: Experts,
    act: Activation,
) -> str:
    """What `Ops.moe` says, of `x` [B, S, width].

    `expert` is called for one expert after another, and what it gives is written at once.
    """
    rows = graph.node("Reshape", [x, graph.integers(-1, router.inputs)])
    shares, chosen = _route(graph, emit_linear(graph, rows, router), experts)
    pairs = _sort(graph, chosen, experts)
    runs = [graph.name("run") for _ in range(experts.count)]
    graph.node("Split", [graph.node("Gather", [rows, pairs.tokens]), pairs.counts], runs, axis=0)
    mixed = [emit_gated_mlp(graph, run, expert(e), act) for e, run in enumerate(runs)]
    every = graph.node("Concat", mixed, axis=0)
    shape = graph.integers(-1, experts.chosen, router.inputs)
    back = graph.node("Reshape", [graph.node("Gather", [every, pairs.places]), shape])
    weighted = graph.node("Mul", [back, graph.node("Unsqueeze", [shares, graph.integers(-1)])])
    total = graph.node("ReduceSum", [weighted, graph.integers(1)], keepdims=0)
    return graph.node("Reshape", [total, graph.node("Shape", [x])])


def _route(graph: OnnxGraph, routed: str, experts: Experts) -> tuple[str, str]:
    """The shares and the numbers of the chosen experts, [T, chosen] each."""
    shares, chosen = graph.name("shares"), graph.name("chosen")
    likely = graph.node("Softmax", [routed], axis=-1)
    graph.node("TopK", [likely, graph.integers(experts.chosen)], [shares, chosen], axis=-1)
    if experts.normalised:
        total = graph.node("ReduceSum", [shares, graph.integers(-1)], keepdims=1)
        shares = graph.node("Div", [shares, total])
    return shares, chosen


def _sort(graph: OnnxGraph, chosen: str, experts: Experts) -> _Sorted:
    flat = graph.node("Reshape", [chosen, graph.integers(-1)])
    everywhere = graph.node("Shape", [flat])

    def order(values: str) -> str:
        """Indices that sort `values` upwards; TopK leaves equal ones in place."""
        unused, indices = graph.name("sorted"), graph.name("order")
        graph.node("TopK", [values, everywhere], [unused, indices], largest=0)
        return indices

    pairs = order(flat)
    column = graph.node("Unsqueeze", [flat, graph.integers(-1)])
    numbers = graph.constant("numbers", np.arange(experts.count, dtype=np.int64))
    hits = graph.node("Cast", [graph.node("Equal", [column, numbers])], to=TensorProto.INT64)
    return _Sorted(
        tokens=graph.node("Div", [pairs, graph.integers(experts.chosen)]),
        counts=graph.node("ReduceSum", [hits, graph.integers(0)], keepdims=0),
        # To sort a permutation is to invert it.
        places=order(pairs),
    )
