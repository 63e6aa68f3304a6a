"""`Ops`: the verbs of the forward walk, which every backend implements.

An implementation may run now on tensors (`TorchOps`, `PagedOps`) or emit a graph (`OnnxOps`,
`OpenVinoOps`); `X` is its own value type and the walk never looks inside. Rotary positions are a
part of `attention` because every fused kernel takes them there. Fusion belongs in here: `linears`
and `gated_mlp` say which weights share an input, and an implementation may merge them.

What a backend cannot express with its fused operator it lowers to plain ones, or refuses with a
`ConversionError` that names the feature; it never leaves one out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tidegate.model.architecture import Activation, AttentionSpec, Experts
from tidegate.model.encoder import Pooling
from tidegate.model.packed import Array, Linear

X = TypeVar("X")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class GatedMlp:
    """The three weights of `down(act(gate(x)) * up(x))`."""

    gate: Linear
    up: Linear
    down: Linear


class CommonOps(Protocol[X]):
    """Verbs of decoders and encoders. Rows are tokens: values are [T, width], or [B, T, width]."""

    def embed(self, table: Linear) -> X:
        """Rows of `table` [V, width] for the step's input tokens."""

    def linears(self, x: X, weights: Sequence[Linear]) -> Sequence[X]:
        """`x @ w.T + bias` for each weight; they share the input and may be merged."""

    def add(self, x: X, y: X) -> X:
        """The residual sum."""


class Ops(CommonOps[X], Protocol[X]):
    """What a decoder is made of."""

    def rms_norm(self, x: X, weight: Array, eps: float) -> X:
        """`x / sqrt(mean(x ** 2) + eps) * weight` (Zhang & Sennrich 2019).

        Taken over each run of `len(weight)` values of the last axis: over the row, or over every
        head of it when the weight is one head long.
        """

    def scale(self, x: X, factor: float) -> X:
        """`x * factor`; never called with 1."""

    def clip(self, x: X, limit: float) -> X:
        """`x` cut to [-limit, limit]."""

    def softcap(self, x: X, cap: float) -> X:
        """`cap * tanh(x / cap)`."""

    def attention(self, q: X, k: X, v: X, spec: AttentionSpec) -> X:
        """Rotate q and k, append k and v to the KV cache, attend causally. q: [T, N * H]."""

    def gated_mlp(self, x: X, gate: Linear, up: Linear, down: Linear, act: Activation) -> X:
        """`down(act(gate(x)) * up(x))`."""

    def moe(
        self,
        x: X,
        router: Linear,
        expert: Callable[[int], GatedMlp],
        experts: Experts,
        act: Activation,
    ) -> X:
        """The weighted sum of the gated MLPs that the router chooses for each token.

        Weights are the softmax over all `experts.count` router outputs, of which the
        `experts.chosen` largest stay, scaled to sum to 1 if `experts.normalised`.
        `expert(e)` reads the weights of one expert, once each and in order.
        """

    def gather_rows(self, x: X) -> X:
        """Keep only the rows whose next token is wanted; the head is computed for those."""

    def head(self, x: X, table: Linear) -> X:
        """Logits [rows, V]; `table` is the embedding's when the head is tied."""


class EncoderOps(CommonOps[X], Protocol[X]):
    """What an encoder is made of; texts of a batch do not see each other, nor their padding."""

    def positions(self, table: Linear) -> X:
        """Row 0, 1, 2, ... of `table` [context, width] for the tokens of each text."""

    def token_types(self, table: Linear) -> X:
        """Row 0 of `table` [types, width], to be added to every token."""

    def layer_norm(self, x: X, weight: Array, bias: Array, eps: float) -> X:
        """`(x - mean) / sqrt(var + eps) * weight + bias` over the last axis (Ba et al. 2016)."""

    def full_attention(self, q: X, k: X, v: X, heads: int, scale: float) -> X:
        """Every token attends to every token of its text. [T, N * H] each."""

    def mlp(self, x: X, up: Linear, down: Linear, act: Activation) -> X:
        """`down(act(up(x)))`."""

    def pool(self, x: X, pooling: Pooling) -> X:
        """One row per text."""

    def activate(self, x: X, act: Activation) -> X:
        """The non-linearity alone."""

    def tanh(self, x: X) -> X:
        """The hyperbolic tangent."""

    def unit(self, x: X) -> X:
        """Each row scaled to length 1, at least 1e-12 before dividing."""
