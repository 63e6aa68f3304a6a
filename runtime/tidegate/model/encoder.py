"""`EncoderArchitecture`: a bidirectional transformer that turns a text into one vector.

The BERT family: learned positions, layer norm after each residual sum, a plain MLP, no KV cache.
What comes out is a pooled embedding, or one logit per label when there is a classifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tidegate.model.architecture import Activation

Pooling = Literal["mean", "cls"]
"""How token vectors become one: their mean, or the first token's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderArchitecture:
    """An encoder, as `tidegate.model.walk.encoder` sees it. Sizes are in values, not bytes."""

    model_type: str
    layers: int
    width: int
    heads: int
    inner: int
    vocab: int
    context: int
    """Positions the model can be served with: rows of the table of learned positions."""
    norm_eps: float
    activation: Activation
    token_types: int
    """Rows of the token type table; 0 without one. All tokens are of type 0."""
    pooling: Pooling
    normalised: bool = False
    """The embedding is scaled to length 1."""
    pooler: Literal["none", "tanh", "relu"] = "none"
    """A linear layer and its non-linearity between pooling and the classifier."""
    labels: tuple[str, ...] = ()
    """Names of the classes; empty for an embedding."""

    @property
    def head_size(self) -> int:
        """Values of an attention head."""
        return self.width // self.heads

    @property
    def outputs(self) -> int:
        """Values per text: one per label, or the width of an embedding."""
        return len(self.labels) or self.width

    @property
    def parameters(self) -> int:
        """Number of weights, norms and biases left out."""
        tables = (self.vocab + self.context + self.token_types) * self.width
        layer = 4 * self.width * self.width + 2 * self.width * self.inner
        top = self.width * self.width if self.pooler != "none" else 0
        return tables + self.layers * layer + top + len(self.labels) * self.width
