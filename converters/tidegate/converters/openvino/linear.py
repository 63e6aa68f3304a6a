"""`LinearLayers`: matrix products and table rows of an OpenVINO graph, in the form that fuses.

Rows are tokens: values are [T, width]. Weights that share an input and agree in kind become one
product; a low-rank layer becomes two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import openvino.opset13 as op

from tidegate.converters.openvino import graph
from tidegate.converters.openvino.export import padding
from tidegate.converters.openvino.graph import Node
from tidegate.converters.openvino.weights import ConstantFile
from tidegate.converters.stacking import stack, stacks
from tidegate.model.packed import (
    DenseLinear,
    Linear,
    LowRankLinear,
    PackedLinear,
    dense_weight,
)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Stored:
    """A layer or table whose weights are constants of the graph, to be used any number of times."""

    factors: tuple[PackedLinear | DenseLinear, ...]
    """What the input is multiplied with, one after another: two of a low-rank layer."""
    constants: tuple[Node, ...]
    """The float32 weight of each."""


class LinearLayers:
    """Emits products with weights whose constants go to a `ConstantFile`."""

    def __init__(self, constants: ConstantFile) -> None:
        """Stream weights to `constants`."""
        self._constants = constants
        self._groups: set[int] = set()

    @property
    def smallest_group(self) -> int:
        """The smallest group of inputs that share a scale in a product; 0 when all are dense."""
        return min(self._groups, default=0)

    def store(self, linear: Linear) -> Stored:
        """Write a layer's weights."""
        factors = (linear.first, linear.second) if isinstance(linear, LowRankLinear) else (linear,)
        constants = tuple(self._constants.weight(factor) for factor in factors)
        return Stored(factors=factors, constants=constants)

    def store_table(self, table: Linear) -> Stored:
        """Write a table that rows are read from: one row is a row of its last factor."""
        if isinstance(table, LowRankLinear):
            # Packed, the first factor could not be read across its groups.
            table = replace(table, first=DenseLinear(weight=dense_weight(table.first)))
        return self.store(table)

    def rows(self, table: Stored, ids: Node) -> Node:
        """Rows of an embedding table, decompressed after they are gathered, whatever their bits."""
        last = table.factors[-1]
        rows = op.gather(table.constants[-1], ids, graph.scalar(graph.ROWS))
        if padding(last):
            rows = graph.first_columns(rows, last.inputs)
        if len(table.factors) == 1:
            return rows
        return op.matmul(rows, table.constants[0], False, False)

    def products(self, x: Node, weights: Sequence[Linear]) -> list[Node]:
        """`x @ w.T + bias` for each weight; those that agree are merged into one product."""
        results: dict[int, Node] = {}
        for positions in stacks(weights):
            parts = [weights[position] for position in positions]
            product = self.product(x, self.store(stack(parts)))
            pieces = graph.split_columns(product, [part.outputs for part in parts])
            results.update(zip(positions, pieces, strict=True))
        return [results[position] for position in range(len(weights))]

    def product(self, x: Node, stored: Stored) -> Node:
        """`x @ w.T + bias`."""
        for factor, weight in zip(stored.factors, stored.constants, strict=True):
            if isinstance(factor, PackedLinear):
                self._groups.add(factor.group_size)
            x = op.matmul(graph.pad_columns(x, padding(factor)), weight, False, True)
            if factor.bias is not None:
                x = op.add(x, graph.vector(factor.bias))
        return x
