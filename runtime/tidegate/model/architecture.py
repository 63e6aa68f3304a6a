"""`Architecture`: everything the forward walk needs to know about a model, and nothing else.

It is read from a Hugging Face `config.json` by the module of `tidegate.model.architectures` that
bears the config's `model_type`; a new architecture adds one such module and touches nothing here.
Layers that differ (sliding and full attention in turn, some without position embedding, some with
experts) share a few `LayerKind`s, and `pattern` says which layer is of which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tidegate.model.rope import Rope

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
"""Non-linearity of an MLP; `gelu` is the exact one, `gelu_tanh` the approximation."""

QkNorm = Literal["none", "head", "row"]
"""RMS norm of query and key before the rotation: of each head alone, or of the whole row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """One layer's attention: N query heads of H values sharing K key/value heads."""

    layer: int
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    """Factor on q.k before the softmax, usually `head_size ** -0.5`."""
    rope: Rope | None
    """None for a layer without position embedding."""
    window: int | None = None
    """A token sees itself and the `window - 1` before it; None for all before it."""
    softcap: float | None = None
    """Scores become `softcap * tanh(score / softcap)` before the softmax."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """A mixture-of-experts MLP: a router picks `chosen` of `count` gated MLPs for every token."""

    count: int
    chosen: int
    inner: int
    """Width of one expert."""
    normalised: bool
    """Whether the weights of the chosen ones are scaled to sum to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKind:
    """What layers of one kind have in common and others may have differently."""

    rope: Rope | None
    window: int | None = None
    """See `AttentionSpec.window`."""
    experts: Experts | None = None
    """None for a plain gated MLP of the architecture's `inner` width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A decoder-only transformer, as the walk sees it. Sizes are in values, not bytes."""

    model_type: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    """Width of the gated MLP."""
    vocab: int
    context: int
    """Positions the model can be served with, which the rotation is made for."""
    norm_eps: float
    activation: Activation
    kinds: tuple[LayerKind, ...]
    pattern: tuple[int, ...] = ()
    """Index into `kinds` of every layer; empty when all are of the first."""
    tied_head: bool
    """The head is the embedding table."""
    attention_scale: float
    """See `AttentionSpec.scale`."""
    attention_softcap: float | None = None
    head_softcap: float | None = None
    """Logits become `softcap * tanh(logit / softcap)`."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm = "none"
    qkv_clip: float | None = None
    """Query, key and value are cut to this magnitude, behind the norm if there is one."""
    norm_before: bool = True
    """Attention and MLP read a normalised residual stream."""
    norm_after: bool = False
    """What attention and MLP give is normalised before it is added to the residual stream."""
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    """Factor on what attention and MLP add to the residual stream."""
    head_scale: float = 1.0

    def kind(self, layer: int) -> LayerKind:
        """What `layer`, 0-based, is like."""
        return self.kinds[self.pattern[layer] if self.pattern else 0]

    def attention(self, layer: int) -> AttentionSpec:
        """Attention of `layer`, 0-based."""
        kind = self.kind(layer)
        return AttentionSpec(
            layer=layer,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            scale=self.attention_scale,
            rope=kind.rope,
            window=kind.window,
            softcap=self.attention_softcap,
        )

    @property
    def parameters(self) -> int:
        """Number of weights, norms and biases left out (under 0.1 % of any real model)."""
        attention = self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        tables = self.vocab * self.width * (1 if self.tied_head else 2)
        return tables + sum(attention + self._mlp_weights(i) for i in range(self.layers))

    def _mlp_weights(self, layer: int) -> int:
        experts = self.kind(layer).experts
        if experts is None:
            return 3 * self.width * self.inner
        return experts.count * (3 * self.width * experts.inner + self.width)

    @property
    def kv_values_per_token(self) -> int:
        """Key plus value numbers kept per token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size
