"""A program: exports a model of few and of many layers, and prints by how much the peak grew.

    python exportpeak.py FOLDER

Memory is only told per process, so the test runs this in one of its own. All layers are the same
arrays: what grows is what the export holds.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from tinymodel import tiny_architecture

from tidegate.converters.openvino.ops import export_openvino
from tidegate.model.packed import Array, Linear, PackedLinear
from tidegate.model.roles import roles

FEW, MANY, GROUP_SIZE = 2, 26, 32
ARCH = replace(tiny_architecture(layers=MANY, width=1024), inner=4096)
SHAPES = {name: role.shape for name, role in roles(ARCH).items()}


class SameWeights:
    """Weights that are one array for each shape."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], PackedLinear] = {}

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        shape = SHAPES[role]
        if shape not in self._made:
            outputs, groups = shape[0], shape[1] // GROUP_SIZE
            self._made[shape] = PackedLinear(
                values=np.full((outputs, groups, GROUP_SIZE // 2), 0x57, np.uint8),
                scales=np.ones((outputs, groups), np.float32),
                zeros=None,
                inputs=shape[1],
                bits=4,
                group_size=GROUP_SIZE,
            )
        return self._made[shape]

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        return np.ones(SHAPES[role], np.float32)


def peak_kib() -> int:
    """The most memory this process had, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Print the growth in KiB."""
    weights, peaks = SameWeights(), []
    for layers in (FEW, MANY):
        export_openvino(replace(ARCH, layers=layers), weights, Path(sys.argv[1]))
        peaks.append(peak_kib())
    print(peaks[1] - peaks[0])


if __name__ == "__main__":
    main()
