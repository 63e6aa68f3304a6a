"""`Calibrated`: takes calibration text through a model one block after another.

What the last finished block gave lies in a file of the stage's folder, so a conversion that was
interrupted goes on from there and gives the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tidegate.converters.driver.activations import read_activations, write_activations
from tidegate.converters.driver.block_data import BlockStatistics
from tidegate.converters.driver.block_walk import BlockWalk, batches_of
from tidegate.converters.passes.base import Block, CalibrationText
from tidegate.kernels.torch_ops import Tensor, WeightTensors
from tidegate.model.blocks import block_names
from tidegate.model.registry import AnyArchitecture
from tidegate.model.resident import ResidentWeights
from tidegate.model.walk import Weights


class Calibrated:
    """Where calibration text is in a model."""

    def __init__(
        self, arch: AnyArchitecture, text: CalibrationText, folder: Path, rest: Weights
    ) -> None:
        """Begin, or go on with what lies in `folder`.

        Args:
            arch: of the model.
            text: what to run.
            folder: for what blocks give.
            rest: weights of blocks that are finished.
        """
        self._arch, self._folder, self._rest = arch, folder, rest
        self._batches = tuple(batches_of(text.sequences))
        self._rows = [sum(map(len, batch)) for batch in self._batches]
        self._names = block_names(arch)
        self._behind = max(
            (at for at, one in enumerate(self._names) if self._path(one).exists()), default=-1
        )

    def data(self, block: Block) -> BlockStatistics:
        """What the text looks like inside a block, which is the next one."""
        assert self._names.index(block.name) == self._behind + 1, block.name
        return BlockStatistics(block, self._arch, self._batches, self._inputs, self._rest)

    def advance(self, block: str, weights: Weights) -> None:
        """Take the text through a block with these weights, if that has not been done before."""
        at = self._names.index(block)
        if at != self._behind + 1:
            return
        write_activations(self._path(block), self._outputs(block, weights))
        self._behind = at
        for old in self._names[:at]:
            self._path(old).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove what is not needed any more."""
        for name in self._names:
            self._path(name).unlink(missing_ok=True)

    def _outputs(self, block: str, weights: Weights) -> Iterator[Tensor]:
        # One object per role, so that what is dequantised for a batch serves the next.
        resident, tensors = ResidentWeights(weights), WeightTensors()
        first = self._behind < 0
        inputs = iter([None] * len(self._batches)) if first else self._inputs()
        for batch, x in zip(self._batches, inputs, strict=True):
            yield BlockWalk(arch=self._arch, block=block, batch=batch).run(x, resident, tensors)

    def _inputs(self) -> Iterator[Tensor]:
        path = self._path(self._names[self._behind])
        return read_activations(path, self._rows, self._arch.width)

    def _path(self, block: str) -> Path:
        return self._folder / f"after-{block}.f32"
