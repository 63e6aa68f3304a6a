"""LoRA: an adapter added to the weights as they are read; see `tidegate.model.lora`.

One layer's matrices are read at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tidegate.converters.rounding.packing import RowWeights
from tidegate.converters.rounding.rtn import Rows
from tidegate.errors import ConversionError
from tidegate.model.lora import Adapter, LayerDelta
from tidegate.model.packed import Array, DenseLinear, Linear
from tidegate.model.registry import Source
from tidegate.model.safetensors_file import SafetensorsFile
from tidegate.model.walk import Weights


class Lora(Adapter):
    """An open adapter that can be merged. Use it as a context manager: it holds an open file."""

    def merged(self, weights: Weights, sources: Mapping[str, Source]) -> MergedWeights:
        """`weights` with the adapter added, read while this is open.

        Args:
            weights: those of the checkpoint the adapter was trained for.
            sources: where each role lies in that checkpoint; tells which layer is which role.

        Raises:
            CheckpointError: a tensor of the adapter belongs to no layer, or has a wrong shape.
        """
        return MergedWeights(weights, self.file, self.deltas(sources))


class MergedWeights:
    """`tidegate.model.walk.Weights` with an adapter added to some roles, as they are read."""

    def __init__(
        self, weights: Weights, file: SafetensorsFile, deltas: Mapping[str, LayerDelta]
    ) -> None:
        """See `Lora.merged`."""
        self._weights, self._file, self._deltas = weights, file, deltas

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`.

        Raises:
            ConversionError: the layer is quantised already, or the adapter is for another shape.
        """
        linear, delta = self._weights.linear(role), self._deltas.get(role)
        if delta is None:
            return linear
        if not isinstance(linear, DenseLinear):
            raise ConversionError(
                f"{role}: is quantised in the checkpoint: a LoRA cannot be merged without "
                "quantising it anew; take the checkpoint that it was quantised from"
            )
        a, b = self._file.read(delta.a), self._file.read(delta.b, delta.rows)
        if (len(b), a.shape[1]) != linear.weight.shape:
            raise ConversionError(
                f"{delta.b}: is for a weight {(len(b), a.shape[1])}: {role} is "
                f"{linear.weight.shape}"
            )
        b *= np.float32(delta.scale)
        base = linear.weight if delta.base is None else self._file.read(delta.base, delta.rows)
        if base.shape != linear.weight.shape:
            raise ConversionError(
                f"{delta.base}: shape {base.shape}: {role} is {linear.weight.shape}"
            )
        weight: Array = base + b @ a
        return DenseLinear(weight=weight, bias=linear.bias)

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        return self._weights.vector(role)

    def by_rows(self, role: str) -> tuple[Rows, Array | None] | None:
        """As the weights below have it; a layer that the adapter changes is read whole."""
        if role in self._deltas or not isinstance(self._weights, RowWeights):
            return None
        return self._weights.by_rows(role)
