"""The walk in float32 on torch: what a bundle is held against, logits and what lies between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from tidegate.kernels.torch_encoder_ops import TorchEncoderOps
from tidegate.kernels.torch_ops import TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model.architecture import Architecture
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.resident import ResidentWeights
from tidegate.model.walk import Weights, decoder, embed, encoder, layer

Logits = npt.NDArray[np.float32]


class _EveryToken(TorchOps):
    """Keeps every row, so that the head gives logits for every token."""

    def gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """See `Ops.gather_rows`."""
        return x


@torch.inference_mode()
def reference_logits(
    arch: Architecture, weights: Weights, sequences: Sequence[Sequence[int]]
) -> Iterator[Logits]:
    """Logits [tokens, V] after every token of each sequence; all weights stay in memory."""
    resident, tensors = ResidentWeights(weights), WeightTensors()
    for sequence in sequences:
        ops = _ops(arch, sequence, tensors)
        yield decoder(ops, arch, resident).numpy().astype(np.float32)


@torch.inference_mode()
def reference_embeddings(
    arch: EncoderArchitecture, weights: Weights, texts: Sequence[Sequence[int]]
) -> Logits:
    """What an encoder gives for each text, [texts, outputs]."""
    resident, tensors = ResidentWeights(weights), WeightTensors()
    rows = [encoder(TorchEncoderOps([text], tensors), arch, resident) for text in texts]
    return torch.cat(rows).numpy()


@torch.inference_mode()
def reference_streams(
    arch: Architecture, weights: Weights, sequence: Sequence[int]
) -> Iterator[Logits]:
    """The residual stream [tokens, width] behind each layer, one layer's weights at a time."""
    x = embed(_ops(arch, sequence, WeightTensors()), arch, weights)
    for index in range(arch.layers):
        x = layer(_ops(arch, sequence, WeightTensors()), arch, weights, x, index)
        yield x.numpy()


def _ops(arch: Architecture, sequence: Sequence[int], tensors: WeightTensors) -> _EveryToken:
    kv = TorchKv.allocate(
        layers=arch.layers,
        slots=1,
        tokens=len(sequence),
        kv_heads=arch.kv_heads,
        head_size=arch.head_size,
    )
    return _EveryToken([TorchRow(tokens=tuple(sequence), past=0, slot=0)], kv, tensors)
