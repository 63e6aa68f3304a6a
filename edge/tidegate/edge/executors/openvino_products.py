"""Finds the products of packed weights in an OpenVINO graph, and the gated MLPs made of them.

A product is found by the pattern that `tidegate.converters.openvino` writes: constant, convert,
subtract, multiply, reshape, convert behind a matrix product, and maybe a bias after it. A gated MLP
is one product, split in two, the first half through its activation times the second, and another
product. What differs in any way is none: native operations take their bytes on trust.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tidegate.edge.executors.native import Bytes, TileShape

Library: TypeAlias = Any
"""An object of `openvino`, whose types mypy does not follow."""

_BITS = {"u4": 4, "u8": 8}


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Product:
    """A product of the graph, and what the native operation needs of it."""

    matmul: Library
    values: Bytes
    """Of the mapped file, packed low nibble first."""
    scales: npt.NDArray[np.float16]
    zeros: Bytes | None
    """As in the graph: 4-bit ones are packed without gaps."""
    shape: TileShape

    @property
    def name(self) -> str:
        """Unique in the graph."""
        return str(self.matmul.get_friendly_name())


def find_products(model: Library) -> list[Product]:
    """All of them, in the order in which they run."""
    found = [_product(node) for node in model.get_ordered_ops() if _is(node, "MatMul")]
    return [product for product in found if product is not None]


def _product(matmul: Library) -> Product | None:
    """The packed product that ends in `matmul`; None unless all of it is as the converter writes.

    The operation takes its bytes on trust, so what differs in any way is left to OpenVINO.
    """
    chain = _chain(matmul)
    if chain is None:
        return None
    scales, zeros, values = chain
    kind = _type(values)
    bits, dims = _BITS.get(kind), list(values.get_output_shape(0))
    if bits is None or len(dims) != 3 or (_type(zeros), _type(scales)) != (kind, "f16"):
        return None
    outputs, groups, group = dims
    weight = matmul.input(1).get_partial_shape()
    one_each = [outputs, groups, 1]
    if str(weight) != f"[{outputs},{groups * group}]" or _dims(scales) != one_each:
        return None
    middle = _is_middle(zeros, bits)
    if not middle and _dims(zeros) != one_each:
        return None
    return Product(
        matmul=matmul,
        values=values.data.reshape(-1).view(np.uint8),
        scales=scales.data,
        zeros=None if middle else zeros.data.reshape(-1).view(np.uint8),
        shape=TileShape(
            inputs=groups * group, outputs=outputs, bits=bits, group=group, zeros=not middle
        ),
    )


def _chain(matmul: Library) -> tuple[Library, Library, Library] | None:
    """The constants behind a product of floats: scales, zero-points and values."""
    attributes = {"transpose_a": False, "transpose_b": True}
    if matmul.get_attributes() != attributes or _type(matmul) != "f32":
        return None
    chain = [matmul]
    for kind in ("Convert", "Reshape", "Multiply", "Subtract", "Convert", "Constant"):
        place = 1 if len(chain) == 1 else 0
        node = chain[-1].input_value(place).get_node()
        if not _is(node, kind):
            return None
        chain.append(node)
    _, _, _, multiply, subtract, _, values = chain
    converted, scales = (node.input_value(1).get_node() for node in (subtract, multiply))
    if not _is(converted, "Convert") or not _is(scales, "Constant"):
        return None
    zeros = converted.input_value(0).get_node()
    return (scales, zeros, values) if _is(zeros, "Constant") else None


def _is_middle(zeros: Library, bits: int) -> bool:
    """One zero-point for all, in the middle of the range: what the operation takes for none."""
    if _dims(zeros) != [1, 1, 1]:
        return False
    value = int(zeros.data.reshape(-1).view(np.uint8)[0])
    return value & ((1 << bits) - 1) == 1 << (bits - 1)


def biased(product: Product) -> tuple[Library, npt.NDArray[np.float32] | None]:
    """The last node of a product, and its bias if it has one."""
    matmul = product.matmul
    users = list(matmul.output(0).get_target_inputs())
    add = users[0].get_node() if len(users) == 1 else None
    if add is None or not _is(add, "Add"):
        return matmul, None
    bias = add.input_value(1).get_node()
    if not _is(bias, "Constant") or _dims(bias) != [1, product.shape.outputs]:
        return matmul, None
    return add, np.array(bias.data, np.float32).reshape(-1)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class GatedMlp:
    """Two products that are one operation, with what lies between."""

    gate_up: Product
    """The outputs of the gate come first."""
    down: Product
    gate: int
    """Of `kernels/native/src/gated_mlp.h`: 0 for SiLU, 1 for GELU by tanh."""


def find_gated_mlps(products: Iterable[Product]) -> list[GatedMlp]:
    """Those made of two of these products."""
    by_name = {product.name: product for product in products}
    found = [_gated_mlp(product, by_name) for product in by_name.values()]
    return [mlp for mlp in found if mlp is not None]


def _gated_mlp(down: Product, by_name: dict[str, Product]) -> GatedMlp | None:
    """The gated MLP that ends in `down`; no bias may be anywhere."""
    product = down.matmul.input_value(0).get_node()
    if not _is(product, "Multiply") or _users(product) != 1 or _has_bias(down):
        return None
    activation, lifted = (product.input_value(place) for place in range(2))
    gate = _gate_of(activation.get_node())
    split = lifted.get_node()
    if gate is None or not _is(split, "VariadicSplit") or lifted.get_index() != 1:
        return None
    gated = activation.get_node().input_value(0)
    if gated.get_node().get_friendly_name() != split.get_friendly_name() or gated.get_index() != 0:
        return None
    width = down.shape.inputs
    gate_up = by_name.get(split.input_value(0).get_node().get_friendly_name())
    if gate_up is None or _users(gate_up.matmul) != 1 or _users(split) != 2 or width % 16:
        return None
    if [str(split.get_output_partial_shape(half)[1]) for half in range(2)] != [str(width)] * 2:
        return None
    return GatedMlp(gate_up=gate_up, down=down, gate=gate)


def _has_bias(product: Product) -> bool:
    return biased(product)[1] is not None


def _gate_of(node: Library) -> int | None:
    if _users(node) != 1:
        return None
    if _is(node, "Swish"):
        return 0 if _is_plain(node) else None
    tanh = _is(node, "Gelu") and node.get_attributes().get("approximation_mode") == "TANH"
    return 1 if tanh else None


def _is_plain(swish: Library) -> bool:
    """Whether it is SiLU: no factor, or 1."""
    if swish.get_input_size() == 1:
        return True
    factor = swish.input_value(1).get_node()
    return _is(factor, "Constant") and bool(np.all(factor.data == 1))


def _users(node: Library) -> int:
    return sum(len(output.get_target_inputs()) for output in node.outputs())


def _dims(node: Library) -> list[int]:
    return list(node.get_output_shape(0))


def _type(node: Library) -> str:
    return str(node.get_output_element_type(0).to_string())


def _is(node: Library, kind: str) -> bool:
    return bool(node.get_type_name() == kind)
