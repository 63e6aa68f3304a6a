"""The walk in float32 on torch: what a bundle is held against, and where layers begin to differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerError:
    """How far one layer of a compressed model is from the original's."""

    layer: int
    own: float
    """Root mean square of the error that the layer makes on the original's input, over that of
    what the original layer adds to the residual stream."""
    total: float
    """Error of the residual stream behind the layer, all layers before it compressed too, over
    the residual stream itself."""


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
def layer_errors(
    arch: Architecture,
    original: Weights,
    compressed: Weights,
    sequences: Sequence[Sequence[int]],
    on_layer: Callable[[int], None] = lambda done: None,
) -> list[LayerError]:
    """Compare layer by layer, one layer's weights of each model in memory at a time."""
    exact = [embed(_ops(arch, one, WeightTensors()), arch, original) for one in sequences]
    drifted = [embed(_ops(arch, one, WeightTensors()), arch, compressed) for one in sequences]
    found = []
    for index in range(arch.layers):
        sums = np.zeros(4)
        right, packed = _Layer(original), _Layer(compressed)
        for place, sequence in enumerate(sequences):
            before, now = exact[place], _ops(arch, sequence, right.tensors)
            after = layer(now, arch, right.weights, before, index)
            own = layer(_ops(arch, sequence, packed.tensors), arch, packed.weights, before, index)
            drifted[place] = layer(
                _ops(arch, sequence, packed.tensors), arch, packed.weights, drifted[place], index
            )
            pairs = ((own - after), (after - before), (drifted[place] - after), after)
            sums += [float(part.square().sum(dtype=torch.float64)) for part in pairs]
            exact[place] = after
        own_error, total_error = np.sqrt(sums[0::2] / np.maximum(sums[1::2], 1e-30))
        found.append(LayerError(layer=index, own=float(own_error), total=float(total_error)))
        on_layer(index + 1)
    return found


class _Layer:
    """Weights of the layer at hand, read once for all sequences and dropped with it."""

    def __init__(self, source: Weights) -> None:
        self.weights = ResidentWeights(source)
        self.tensors = WeightTensors()


def _ops(arch: Architecture, sequence: Sequence[int], tensors: WeightTensors) -> _EveryToken:
    kv = TorchKv.allocate(
        layers=arch.layers,
        slots=1,
        tokens=len(sequence),
        kv_heads=arch.kv_heads,
        head_size=arch.head_size,
    )
    return _EveryToken([TorchRow(tokens=tuple(sequence), past=0, slot=0)], kv, tensors)
