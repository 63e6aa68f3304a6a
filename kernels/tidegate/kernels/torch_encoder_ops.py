"""`TorchEncoderOps`: the encoder's walk on torch tensors. The definition of correct.

Tokens of all texts lie one after another, [T, width], without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import torch
from torch.nn import functional

from tidegate.kernels.torch_ops import Tensor, WeightTensors, activate
from tidegate.model.architecture import Activation
from tidegate.model.encoder import Pooling
from tidegate.model.packed import Array, Linear


class TorchEncoderOps:
    """One batch of `tidegate.model.ops.EncoderOps[Tensor]`."""

    def __init__(self, texts: Sequence[Sequence[int]], tensors: WeightTensors) -> None:
        """Bind the token ids of each text; `tensors` may be shared by all batches of a model."""
        self._lengths = [len(text) for text in texts]
        self._tokens = torch.tensor([token for text in texts for token in text])
        self._tensors = tensors

    def embed(self, table: Linear) -> Tensor:
        """See `CommonOps.embed`."""
        return self._tensors.get(table)[0][self._tokens]

    def positions(self, table: Linear) -> Tensor:
        """See `EncoderOps.positions`."""
        rows = torch.cat([torch.arange(length) for length in self._lengths])
        return self._tensors.get(table)[0][rows]

    def token_types(self, table: Linear) -> Tensor:
        """See `EncoderOps.token_types`."""
        return self._tensors.get(table)[0][:1]

    def linears(self, x: Tensor, weights: Sequence[Linear]) -> list[Tensor]:
        """See `CommonOps.linears`."""
        return [functional.linear(x, *self._tensors.get(weight)) for weight in weights]

    def layer_norm(self, x: Tensor, weight: Array, bias: Array, eps: float) -> Tensor:
        """See `EncoderOps.layer_norm`."""
        scale, shift = torch.from_numpy(weight), torch.from_numpy(bias)
        return functional.layer_norm(x, scale.shape, scale, shift, eps)

    def full_attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
        """See `EncoderOps.full_attention`."""
        split = [self._texts(x.view(len(x), heads, -1)) for x in (q, k, v)]
        attended = []
        for queries, keys, values in zip(*split, strict=True):
            scores = torch.einsum("tnh,snh->nts", queries, keys) * scale
            attended.append(torch.einsum("nts,snh->tnh", scores.softmax(dim=-1), values))
        return torch.cat(attended).flatten(1)

    def mlp(self, x: Tensor, up: Linear, down: Linear, act: Activation) -> Tensor:
        """See `EncoderOps.mlp`."""
        (widened,) = self.linears(x, [up])
        (narrowed,) = self.linears(activate(widened, act), [down])
        return narrowed

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """See `CommonOps.add`."""
        return x + y

    def pool(self, x: Tensor, pooling: Pooling) -> Tensor:
        """See `EncoderOps.pool`."""
        texts = self._texts(x)
        match pooling:
            case "mean":
                return torch.stack([text.mean(dim=0) for text in texts])
            case "cls":
                return torch.stack([text[0] for text in texts])
            case _:
                assert_never(pooling)

    def _texts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows of each text."""
        return torch.split_with_sizes(x, self._lengths)

    def activate(self, x: Tensor, act: Activation) -> Tensor:
        """See `EncoderOps.activate`."""
        return activate(x, act)

    def tanh(self, x: Tensor) -> Tensor:
        """See `EncoderOps.tanh`."""
        return torch.tanh(x)

    def unit(self, x: Tensor) -> Tensor:
        """See `EncoderOps.unit`."""
        return functional.normalize(x, dim=-1)
