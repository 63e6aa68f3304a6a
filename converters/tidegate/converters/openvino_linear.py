"""`LinearLayers`: matrix products and table rows of an OpenVINO graph, in the form that fuses.

Rows are tokens: values are [T, width]. Weights that share an input and agree in kind become one
product; a low-rank layer becomes two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino.opset13 as op

from tidegate.converters import openvino_graph as graph
from tidegate.converters.openvino_export import padding
from tidegate.converters.openvino_graph import Node
from tidegate.converters.openvino_weights import ConstantFile
from tidegate.converters.stacking import stack, stacks
from tidegate.model.packed import Linear, LowRankLinear, PackedLinear

_ROWS = np.int64(0)
"""The axis that gathers go along."""


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

    def rows(self, table: Linear, ids: Node) -> Node:
        """Rows of an embedding table, decompressed after they are gathered."""
        rows = op.gather(self._constants.weight(table), ids, graph.scalar(_ROWS))
        return rows if padding(table) == 0 else graph.first_columns(rows, table.inputs)

    def products(self, x: Node, weights: Sequence[Linear]) -> list[Node]:
        """`x @ w.T + bias` for each weight."""
        results: dict[int, Node] = {}
        for positions in stacks(weights):
            parts = [weights[position] for position in positions]
            product = self.product(x, stack(parts))
            pieces = graph.split_columns(product, [part.outputs for part in parts])
            results.update(zip(positions, pieces, strict=True))
        return [results[position] for position in range(len(weights))]

    def product(self, x: Node, linear: Linear) -> Node:
        """`x @ w.T + bias`."""
        if isinstance(linear, LowRankLinear):
            return self.product(self.product(x, linear.first), linear.second)
        if isinstance(linear, PackedLinear):
            self._groups.add(linear.group_size)
        weight = self._constants.weight(linear)
        product = op.matmul(graph.pad_columns(x, padding(linear)), weight, False, True)
        return product if linear.bias is None else op.add(product, graph.vector(linear.bias))
