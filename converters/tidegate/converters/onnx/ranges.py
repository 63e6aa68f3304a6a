"""What keys, values and activations of a decoder reach on calibration text.

The model is walked layer by layer with the weights that a bundle ships, so memory does not grow
with its depth; what layers give lies in a file. Keys are seen as they are kept: rotated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch

from tidegate.converters.driver.activations import read_activations, write_activations
from tidegate.converters.driver.block_walk import Batch, batches_of
from tidegate.converters.passes.base import CalibrationText, Progress
from tidegate.kernels.torch_ops import Tensor, TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model import walk
from tidegate.model.architecture import Architecture
from tidegate.model.packed import Array, Linear
from tidegate.model.resident import ResidentWeights
from tidegate.model.walk import Weights

MOST_TOKENS = 32_768
"""As many as passes look at. Few are worse: of the assistant's chats 128 missed magnitudes whose
cutting cost 0.0013 nats, 512 (as many tokens as this) none (benchmarks/edge/onnx_kv.py)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerRanges:
    """Largest magnitudes in one layer."""

    keys: Array
    """Of each channel, [K, H]."""
    values: Array
    """Of each channel, [K, H]."""
    activations: float
    """Of what goes into and comes out of linear layers, and of the residual stream."""


def measure_ranges(
    arch: Architecture, weights: Weights, text: CalibrationText, folder: Path, progress: Progress
) -> list[LayerRanges]:
    """Walk calibration text through the model.

    Args:
        arch: the model.
        weights: as they will run.
        text: what to run; of more than `MOST_TOKENS` some, from all over it.
        folder: for what layers give; it is left as it was.
        progress: called with ("ranges", done, total).
    """
    batches = tuple(batches_of(_some(text.all_sequences)))
    path = folder / "ranges.f32"
    try:
        embed = _Layer(arch, weights, batches, None)
        write_activations(path, embed.outputs(repeat(None)))
        ranges = []
        for index in range(arch.layers):
            progress("ranges", index, arch.layers)
            layer = _Layer(arch, weights, batches, index)
            inputs = read_activations(path, [sum(map(len, one)) for one in batches], arch.width)
            # The file is replaced when it is whole, until which the old one is read.
            write_activations(path, layer.outputs(inputs))
            ranges.append(layer.ranges())
        progress("ranges", arch.layers, arch.layers)
        return ranges
    finally:
        path.unlink(missing_ok=True)


def _some(sequences: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
    """Sequences at even distances, of about `MOST_TOKENS` together."""
    tokens = sum(map(len, sequences))
    return sequences[:: max(-(-tokens // MOST_TOKENS), 1)]


class _Layer:
    """One layer on all batches; None is the table in front of the first."""

    def __init__(
        self, arch: Architecture, weights: Weights, batches: Sequence[Batch], index: int | None
    ) -> None:
        self._arch, self._index, self._batches = arch, index, batches
        # One object per role, so that what is dequantised for a batch serves the next.
        self._weights, self._tensors = ResidentWeights(weights), WeightTensors()
        self._keys, self._values = torch.zeros(2, arch.kv_heads, arch.head_size)
        self._peak = torch.zeros(())

    def outputs(self, inputs: Iterator[Tensor | None]) -> Iterator[Tensor]:
        for batch, x in zip(self._batches, inputs, strict=False):
            with torch.no_grad():
                yield self._run(batch, x)

    def ranges(self) -> LayerRanges:
        return LayerRanges(
            keys=self._keys.numpy(), values=self._values.numpy(), activations=float(self._peak)
        )

    def _run(self, batch: Batch, x: Tensor | None) -> Tensor:
        rows = [TorchRow(tokens=one, past=0, slot=slot) for slot, one in enumerate(batch)]
        kv = self._kv(batch)
        ops = _Watching(rows, kv, self._tensors)
        if self._index is None:
            return walk.embed(ops, self._arch, self._weights)
        assert x is not None
        after = walk.layer(ops, self._arch, self._weights, x, self._index)
        # What a slot does not use is zero, and a magnitude is no less.
        self._keys = torch.maximum(self._keys, kv.keys[self._index].abs().amax((0, 1)))
        self._values = torch.maximum(self._values, kv.values[self._index].abs().amax((0, 1)))
        for seen in (*ops.peaks, after.abs().amax()):
            self._peak = torch.maximum(self._peak, seen)
        return after

    def _kv(self, batch: Batch) -> TorchKv:
        """Room for one layer, whichever it is."""
        kv = TorchKv.allocate(
            layers=1,
            slots=len(batch),
            tokens=max(map(len, batch)),
            kv_heads=self._arch.kv_heads,
            head_size=self._arch.head_size,
        )
        return TorchKv(keys=kv.keys * self._arch.layers, values=kv.values * self._arch.layers)


class _Watching(TorchOps):
    """The definition of correct, which notes the largest magnitudes around linear layers."""

    def __init__(self, rows: Sequence[TorchRow], kv: TorchKv, tensors: WeightTensors) -> None:
        super().__init__(rows, kv, tensors)
        self.peaks: list[Tensor] = []

    def linears(self, x: Tensor, weights: Sequence[Linear]) -> list[Tensor]:
        """See `Ops.linears`."""
        results = super().linears(x, weights)
        self.peaks += [one.abs().amax() for one in (x, *results) if one.numel()]
        return results
