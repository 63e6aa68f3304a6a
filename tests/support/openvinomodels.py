"""Exported OpenVINO models for tests, and small limits for executors on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tinymodel import RandomWeights

from tidegate.converters.openvino.ops import export_openvino
from tidegate.converters.rounding.rtn import quantise
from tidegate.edge.executors.openvino import OpenVinoSettings
from tidegate.edge.executors.openvino_model import compile_graph
from tidegate.model.architecture import Architecture
from tidegate.model.packed import Bits, DenseLinear, Linear, PackedLinear

SETTINGS = OpenVinoSettings(
    kv_tokens=768, context_tokens=256, step_tokens=64, step_rows=4, threads=1, exact=True
)
"""24 blocks; exact arithmetic unless a test replaces it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How every linear layer of a test model is packed; `bits` None leaves them dense."""

    bits: Bits | None = 4
    group_size: int | None = 64
    symmetric: bool = True

    def __str__(self) -> str:
        """A test id, such as `4-bit-g64-sym`."""
        if self.bits is None:
            return "dense"
        kind = "sym" if self.symmetric else "asym"
        return f"{self.bits}-bit-g{self.group_size or 'row'}-{kind}"

    def __call__(self, role: str, linear: DenseLinear) -> Linear:
        """Pack one layer, as `RandomWeights` asks for it."""
        if self.bits is None:
            return linear
        return quantise(
            linear, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric
        )


PACKINGS = [
    Packing(bits=None),
    *(
        Packing(bits=bits, group_size=group_size, symmetric=symmetric)
        for bits in (4, 8)
        for group_size in (32, 64, 128)
        for symmetric in (True, False)
    ),
    Packing(bits=8, group_size=None),
]


def biased(packing: Packing, kinds: tuple[str, ...]) -> Callable[[str, DenseLinear], Linear]:
    """`packing`, with a bias on the layers whose role ends in one of `kinds`."""

    def pack(role: str, linear: DenseLinear) -> Linear:
        packed = packing(role, linear)
        if role.rsplit(".", 1)[-1] not in kinds:
            return packed
        assert isinstance(packed, PackedLinear | DenseLinear)
        bias = np.linspace(-1, 1, linear.outputs, dtype=np.float32)
        return replace(packed, bias=bias)

    return pack


def export(
    arch: Architecture, folder: Path, pack: Callable[[str, DenseLinear], Linear], *, seed: int = 0
) -> RandomWeights:
    """Export a random model to `folder` and return its weights."""
    weights = RandomWeights(arch, seed=seed, quantise=pack)
    export_openvino(arch, weights, folder)
    return weights


def kernels(folder: Path, arch: Architecture) -> Counter[tuple[str, str]]:
    """Kind and precision of every kernel the plugin chose, with their number."""
    compiled: Any = compile_graph(folder / "model.xml", arch, SETTINGS).compiled
    found: Counter[tuple[str, str]] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        found[facts["layerType"].astype(str), facts["runtimePrecision"].astype(str)] += 1
    return found
