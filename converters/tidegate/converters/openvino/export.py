"""What the OpenVINO lowerings of decoders and encoders share: activations, padding, writing.

A graph is built while its weights stream to a scratch file, and written when it is complete, with
names that are the same every time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import assert_never

import openvino.opset13 as op

from tidegate.converters.openvino.graph import Node
from tidegate.converters.openvino.weights import ConstantFile
from tidegate.errors import ConversionError
from tidegate.model.architecture import Activation
from tidegate.model.packed import Array, Linear, PackedLinear
from tidegate.model.walk import Weights

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done and how much there is."""


def emit_activation(x: Node, act: Activation) -> Node:
    """The non-linearity `act`."""
    match act:
        case "silu":
            return op.swish(x)
        case "gelu":
            return op.gelu(x, "erf")
        case "gelu_tanh":
            return op.gelu(x, "tanh")
        case "relu":
            return op.relu(x)
        case _:
            assert_never(act)


def padding(linear: Linear) -> int:
    """Columns that a packed weight has beyond its inputs."""
    if not isinstance(linear, PackedLinear):
        return 0
    return linear.groups * linear.group_size - linear.inputs


def write_model(
    build: Callable[[Weights, ConstantFile], Node],
    weights: Weights,
    layers: int,
    folder: Path,
    progress: Progress | None,
) -> None:
    """Write `folder/model.xml` and `folder/model.bin`.

    Args:
        build: makes the `openvino.Model` from weights and a place for its constants.
        weights: what `build` is given, after it is made to report layers.
        layers: how many the model has.
        folder: made if absent; files of those names are replaced.
        progress: told of every finished layer, then of the writing.

    Raises:
        ConversionError: OpenVINO cannot write the files.
        OSError: the scratch file cannot be written.
    """
    report = progress or _silent
    folder.mkdir(parents=True, exist_ok=True)
    with ConstantFile(folder / "constants.scratch") as constants:
        model = build(_Reported(weights, layers, report), constants)
        report("write", 0, 1)
        _save(model, constants, folder / "model.xml")
        report("write", 1, 1)


def _save(model: Node, constants: ConstantFile, path: Path) -> None:
    _name_by_order(model)
    try:
        constants.save(model, path)
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"{path}: OpenVINO cannot write it: {error}") from error


def _name_by_order(model: Node) -> None:
    """Name nodes by their place: the library counts up over a process, and bytes must repeat."""
    for place, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() != "Parameter":  # those have names that the executor knows
            node.set_friendly_name(f"{node.get_type_name()}_{place}")


class _Reported:
    """Weights that report a layer when the last of them is asked for."""

    def __init__(self, weights: Weights, layers: int, report: Progress) -> None:
        self._weights, self._layers, self._report = weights, layers, report

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        linear = self._weights.linear(role)
        if role.startswith("layers.") and role.endswith(".down"):
            self._report("layers", int(role.split(".")[1]) + 1, self._layers)
        return linear

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        return self._weights.vector(role)


def _silent(what: str, done: int, total: int) -> None:
    pass
