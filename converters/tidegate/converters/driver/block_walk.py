"""Runs one block of a model on calibration text, and shows what enters its linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from tidegate.kernels.torch_encoder_ops import TorchEncoderOps
from tidegate.kernels.torch_ops import Tensor, TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model import walk
from tidegate.model.architecture import Architecture
from tidegate.model.blocks import EMBED, layer_of
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.packed import Linear
from tidegate.model.registry import AnyArchitecture
from tidegate.model.walk import Weights

BATCH_TOKENS = 2048
"""Run together: the widest activation of a model with 1 billion weights then takes 50 MB."""

Seen = Callable[[Linear, Tensor], None]
"""Told each linear layer and its input [rows, in], before it is computed."""

Batch = tuple[tuple[int, ...], ...]


def batches_of(sequences: Sequence[tuple[int, ...]]) -> Iterator[Batch]:
    """The sequences in order, `BATCH_TOKENS` or one of them at a time."""
    batch: list[tuple[int, ...]] = []
    for sequence in sequences:
        if batch and sum(map(len, batch)) + len(sequence) > BATCH_TOKENS:
            yield tuple(batch)
            batch = []
        batch.append(sequence)
    if batch:
        yield tuple(batch)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockWalk:
    """One block of a model on one batch."""

    arch: AnyArchitecture
    block: str
    batch: Batch

    def run(
        self, x: Tensor | None, weights: Weights, tensors: WeightTensors, seen: Seen | None = None
    ) -> Tensor:
        """What the block makes of `x` [tokens, width].

        Args:
            x: what the block before gave; None for `embed`.
            weights: of this block at least.
            tensors: keeps what was dequantised.
            seen: told what enters the linear layers.
        """
        with torch.no_grad():
            if isinstance(self.arch, EncoderArchitecture):
                return self._encoder(self.arch, x, weights, tensors, seen)
            return self._decoder(self.arch, x, weights, tensors, seen)

    def _decoder(
        self,
        arch: Architecture,
        x: Tensor | None,
        weights: Weights,
        tensors: WeightTensors,
        seen: Seen | None,
    ) -> Tensor:
        rows = [TorchRow(tokens=one, past=0, slot=slot) for slot, one in enumerate(self.batch)]
        ops = _Ops(rows, self._kv(arch), tensors, seen)
        layer = layer_of(self.block)
        if self.block == EMBED:
            return walk.embed(ops, arch, weights)
        assert x is not None
        if layer is None:
            return walk.logits(ops, arch, weights, x)
        return walk.layer(ops, arch, weights, x, layer)

    def _kv(self, arch: Architecture) -> TorchKv:
        """Room for one layer, whichever it is."""
        kv = TorchKv.allocate(
            layers=1,
            slots=len(self.batch),
            tokens=max(map(len, self.batch)),
            kv_heads=arch.kv_heads,
            head_size=arch.head_size,
        )
        return TorchKv(keys=kv.keys * arch.layers, values=kv.values * arch.layers)

    def _encoder(
        self,
        arch: EncoderArchitecture,
        x: Tensor | None,
        weights: Weights,
        tensors: WeightTensors,
        seen: Seen | None,
    ) -> Tensor:
        ops = _EncoderOps(self.batch, tensors, seen)
        layer = layer_of(self.block)
        if self.block == EMBED:
            return walk.encoder_embed(ops, arch, weights)
        assert x is not None
        if layer is None:
            return walk.pooled(ops, arch, weights, x)
        return walk.encoder_layer(ops, arch, weights, x, layer)


class _Ops(TorchOps):
    """The definition of correct, with an eye on what enters linear layers."""

    def __init__(
        self, rows: Sequence[TorchRow], kv: TorchKv, tensors: WeightTensors, seen: Seen | None
    ) -> None:
        super().__init__(rows, kv, tensors)
        self._seen = seen

    def linears(self, x: Tensor, weights: Sequence[Linear]) -> list[Tensor]:
        """See `Ops.linears`."""
        if self._seen is not None:
            for weight in weights:
                self._seen(weight, x)
        return super().linears(x, weights)

    def gather_rows(self, x: Tensor) -> Tensor:
        """All of them: every position shows the head something."""
        return x


class _EncoderOps(TorchEncoderOps):
    """The same for encoders."""

    def __init__(
        self, texts: Sequence[Sequence[int]], tensors: WeightTensors, seen: Seen | None
    ) -> None:
        super().__init__(texts, tensors)
        self._seen = seen

    def linears(self, x: Tensor, weights: Sequence[Linear]) -> list[Tensor]:
        """See `Ops.linears`."""
        if self._seen is not None:
            for weight in weights:
                self._seen(weight, x)
        return super().linears(x, weights)
