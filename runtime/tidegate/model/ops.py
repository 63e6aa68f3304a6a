"""`Ops`: the verbs of the forward walk, which every backend implements.

An implementation may run now on tensors (`TorchOps`, `TritonOps`) or emit a graph (`OnnxOps`,
`OpenVinoOps`); `X` is its own value type and the walk never looks inside. Rotary positions are a
part of `attention` because every fused kernel takes them there. Fusion belongs in here: `linears`
and `gated_mlp` say which weights share an input, and an implementation may merge them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from tidegate.model.architecture import Activation, AttentionSpec
from tidegate.model.packed import Array, Linear

X = TypeVar("X")


class Ops(Protocol[X]):
    """Lowers one verb at a time. Rows are tokens: values are [T, width], or [B, T, width]."""

    def embed(self, table: Linear) -> X:
        """Rows of `table` [V, width] for the step's input tokens."""

    def linears(self, x: X, weights: Sequence[Linear]) -> Sequence[X]:
        """`x @ w.T + bias` for each weight; they share the input and may be merged."""

    def rms_norm(self, x: X, weight: Array, eps: float) -> X:
        """`x / sqrt(mean(x ** 2) + eps) * weight` over the last axis (Zhang & Sennrich 2019)."""

    def attention(self, q: X, k: X, v: X, spec: AttentionSpec) -> X:
        """Rotate q and k, append k and v to the KV cache, attend causally. q: [T, N * H]."""

    def gated_mlp(self, x: X, gate: Linear, up: Linear, down: Linear, act: Activation) -> X:
        """`down(act(gate(x)) * up(x))`."""

    def add(self, x: X, y: X) -> X:
        """The residual sum."""

    def gather_rows(self, x: X) -> X:
        """Keep only the rows whose next token is wanted; the head is computed for those."""

    def head(self, x: X, table: Linear) -> X:
        """Logits [rows, V]; `table` is the embedding's when the head is tied."""
