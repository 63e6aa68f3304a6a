"""Whole sequences through the walk at once, on torch: every token's logits, no cache, gradients.

`SequenceOps` is `TorchOps` for sequences that begin at position 0: keys and values are those of the
step, so nothing is written in place and autograd can follow. Passes that look at a whole model
take its layers one at a time over the residual streams of all sequences (`embedded`, `through`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from tidegate.kernels.torch_ops import Tensor, TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model.architecture import Architecture
from tidegate.model.packed import Array, Linear
from tidegate.model.roles import layer_roles
from tidegate.model.walk import Weights, embed, layer, logits

Tokens = tuple[int, ...]

Observe = Callable[[Linear, Tensor], None]
"""Told (linear layer, its input [tokens, in])."""


class SequenceOps(TorchOps):
    """`Ops[Tensor]` over whole sequences, packed [T, width]; logits of every token."""

    def __init__(
        self,
        sequences: Sequence[Tokens],
        tensors: WeightTensors,
        observe: Observe | None = None,
    ) -> None:
        """Bind the sequences; `observe` is told the input of every linear layer."""
        rows = [TorchRow(tokens=tokens, past=0, slot=0) for tokens in sequences]
        super().__init__(rows, TorchKv(keys=[], values=[]), tensors)
        self._observe = observe

    def linears(self, x: Tensor, weights: Sequence[Linear]) -> list[Tensor]:
        """See `Ops.linears`."""
        if self._observe is not None:
            for weight in weights:
                self._observe(weight, x)
        return super().linears(x, weights)

    def gather_rows(self, x: Tensor) -> Tensor:
        """Every token is wanted."""
        return x

    def _remember(self, row: TorchRow, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return k, v


class HeldLayer:
    """`Weights` of one layer, read once, so that its linear layers can be told by identity."""

    def __init__(self, arch: Architecture, weights: Weights, index: int) -> None:
        """Read layer `index`."""
        self.linears: dict[str, Linear] = {}
        self.vectors: dict[str, Array] = {}
        for name, role in layer_roles(arch, index).items():
            if role.is_linear:
                self.linears[name] = weights.linear(name)
            else:
                self.vectors[name] = weights.vector(name)

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        return self.linears[role]

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        return self.vectors[role]


def batched(sequences: Iterable[Tokens], most_tokens: int) -> list[list[Tokens]]:
    """Sequences in order, in batches of at most `most_tokens`, or of one that is longer."""
    batches: list[list[Tokens]] = []
    room = 0
    for tokens in sequences:
        if not batches or len(tokens) > room:
            batches.append([])
            room = most_tokens
        batches[-1].append(tokens)
        room -= len(tokens)
    return batches


@torch.no_grad()
def embedded(
    arch: Architecture, weights: Weights, batches: Sequence[Sequence[Tokens]]
) -> list[Tensor]:
    """What enters the first layer, [tokens, width] for every batch."""
    tensors = WeightTensors()
    return [embed(SequenceOps(batch, tensors), arch, weights) for batch in batches]


@torch.no_grad()
def through(
    arch: Architecture,
    weights: Weights,
    index: int,
    batches: Sequence[Sequence[Tokens]],
    streams: Sequence[Tensor],
    observe: Observe | None = None,
) -> list[Tensor]:
    """What layer `index` makes of the residual streams, batch by batch."""
    tensors = WeightTensors()
    return [
        layer(SequenceOps(batch, tensors, observe), arch, weights, x, index)
        for batch, x in zip(batches, streams, strict=True)
    ]


@torch.no_grad()
def log_probabilities(
    arch: Architecture, weights: Weights, batch: Sequence[Tokens], stream: Tensor
) -> Tensor:
    """Of every next token [tokens, V], from what the last layer gave."""
    return logits(SequenceOps(batch, WeightTensors()), arch, weights, stream).log_softmax(dim=-1)
