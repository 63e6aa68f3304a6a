"""What tests of passes over whole models need: text, models in memory, and both backends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from everylogit import reference_logits
from openvinomodels import SETTINGS

from tidegate.converters.onnx.ops import export_onnx
from tidegate.converters.openvino.ops import export_openvino
from tidegate.converters.passes.base import CalibrationText
from tidegate.converters.rounding.rtn import quantise
from tidegate.edge.executors.onnx import OnnxExecutor, OnnxSettings
from tidegate.edge.executors.openvino import OpenVinoExecutor
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.model.architecture import Architecture
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.packed import Array, DenseLinear, Linear
from tidegate.model.recipe import Format
from tidegate.model.registry import AnyArchitecture
from tidegate.model.roles import roles
from tidegate.model.walk import Weights

TOLERANCE = 1e-4
"""On logits of scale 6, as in the tests of the backends."""


def tiny_encoder() -> EncoderArchitecture:
    """A BERT that no pass over decoders can take."""
    return EncoderArchitecture(
        model_type="bert",
        layers=2,
        width=32,
        heads=2,
        inner=64,
        vocab=50,
        context=32,
        norm_eps=1e-5,
        activation="gelu",
        token_types=2,
        pooling="mean",
    )


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that tells nobody."""


def random_text(
    arch: AnyArchitecture, *, count: int = 6, tokens: int = 20, seed: int = 0
) -> CalibrationText:
    """Sequences of random tokens, of slightly different lengths."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    lengths = [tokens + number % 3 for number in range(count)]
    sequences = tuple(tuple(rng.integers(0, arch.vocab, n).tolist()) for n in lengths)
    return CalibrationText(name="random", sha256="0" * 64, sequences=sequences)


class MemoryWeights:
    """`Weights` in two mappings, copied from others and then free to be changed."""

    def __init__(self, arch: AnyArchitecture, weights: Weights) -> None:
        self.linears: dict[str, Linear] = {}
        self.vectors: dict[str, Array] = {}
        for name, role in roles(arch).items():
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

    def change(self, role: str, weight: Array) -> None:
        """Give a dense layer another weight; its bias stays."""
        self.linears[role] = DenseLinear(weight=weight, bias=self.linears[role].bias)


def packed(arch: AnyArchitecture, weights: Weights, wanted: Format | None = None) -> MemoryWeights:
    """Every dense linear layer in one format, of 4 or 8 bits; 4 in groups of 64 when None."""
    wanted, found = wanted or Format(), MemoryWeights(arch, weights)
    assert wanted.bits != 32
    for role, linear in found.linears.items():
        if isinstance(linear, DenseLinear):
            found.linears[role] = quantise(
                linear,
                bits=wanted.bits,
                group_size=wanted.group_size,
                symmetric=wanted.symmetric,
            )
    return found


def every_logit(arch: Architecture, weights: Weights, tokens: tuple[int, ...]) -> Array:
    """Logits [T, V] on torch."""
    return reference_logits(arch, weights, np.array(tokens, np.int64))


def assert_both_backends_run_it(arch: Architecture, weights: Weights, folder: Path) -> None:
    """Export 4-bit weights to ONNX and OpenVINO; both must give the logits of torch."""
    ready = packed(arch, weights)
    tokens = np.random.default_rng(1).integers(0, arch.vocab, 9)
    reference = reference_logits(arch, ready, tokens)[-1:]
    for target in ("onnx", "openvino"):
        (folder / target).mkdir()
    export_onnx(arch, ready, folder / "onnx")
    onnx = OnnxExecutor(
        folder / "onnx",
        arch,
        OnnxSettings(slots=1, context_tokens=32, step_tokens=32, threads=1, exact=True),
    )
    logits = onnx.execute(ExecutorStep(rows=(Row(tokens=tokens, past=0, slot=0),))).logits
    np.testing.assert_allclose(logits, reference, atol=TOLERANCE, rtol=0)
    export_openvino(arch, ready, folder / "openvino")
    openvino = OpenVinoExecutor(folder / "openvino", arch, SETTINGS)
    row = Row(tokens=tokens, past=0, blocks=np.arange(1, dtype=np.int32))
    logits = openvino.execute(ExecutorStep(rows=(row,))).logits
    np.testing.assert_allclose(logits, reference, atol=TOLERANCE, rtol=0)
    openvino.close()


def weight_bytes(folder: Path) -> Mapping[str, int]:
    """Bytes of the files with weights, by target."""
    return {
        "onnx": (folder / "onnx" / "model.onnx.data").stat().st_size,
        "openvino": (folder / "openvino" / "model.bin").stat().st_size,
    }
