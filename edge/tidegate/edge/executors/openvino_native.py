"""Swaps the products of an OpenVINO graph for the native operation, in place and after reading.

A product is found by the pattern that `tidegate.converters.openvino` writes: constant, convert,
subtract, multiply, reshape, convert behind a matrix product, and maybe a bias after it. The packed
constants stay in the mapped file of the bundle, unread from then on; a table that is gathered from
as well goes on reading single rows of them. So weights are in memory once, as tiles.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tidegate.edge.executors.file_pages import forget_pages
from tidegate.edge.executors.native import Bytes, NativeLibrary, NativeUnavailable, TileShape
from tidegate.edge.executors.native_tiles import Tiles, load_tiles, parts_of

Library: TypeAlias = Any
"""An object of `openvino`, whose types mypy does not follow."""

_ONE_REHEARSAL = threading.Lock()

_BITS = {"u4": 4, "u8": 8}


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Product:
    """A product of the graph, and what the native operation needs of it."""

    matmul: Library
    values: Bytes
    """Of the mapped file, packed low nibble first."""
    scales: npt.NDArray[np.float16]
    zeros: Bytes | None
    """As in the graph: 4-bit ones are packed without gaps."""
    shape: TileShape


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Swapped:
    """What became of a graph."""

    native: int
    """Products that the native operation computes."""
    products: int
    """Products of packed weights there are."""
    tiles: Tiles
    """Must outlive every model compiled from the graph."""
    rehearsal: Callable[[], AbstractContextManager[None]]
    """Within it the model runs without its products, to take the memory of its largest steps at
    the price of its smallest."""


def swap_products(
    model: Library, core: Library, native: NativeLibrary, file: Path | None
) -> Swapped:
    """Make every product of packed weights that it can run a native one.

    Args:
        model: a graph that was read; changed in place.
        core: the `openvino.Core` that will compile it; learns the operation.
        native: the library.
        file: where tiles are kept, see `load_tiles`.

    Raises:
        NativeUnavailable: the library does not load, or there is nothing to swap. The graph is
            as it was.
    """
    create, rehearse = _operation(core, native)
    products = _products(model)
    sized = [(product, native.tiled_bytes(product.shape)) for product in products]
    sized = [(product, size) for product, size in sized if size]
    if not sized:
        raise NativeUnavailable(f"it can run none of the model's {len(products)} packed products")
    sizes = [size for _, size in sized]
    write = [partial(_write_tiles, native, product) for product, _ in sized]
    names = [f"{product.matmul.get_friendly_name()}: {product.shape}" for product, _ in sized]
    tiles = load_tiles(names, sizes, write, file)
    for (product, _), part in zip(sized, parts_of(tiles.data, sizes), strict=True):
        _swap(product, part, create)
    return Swapped(
        native=len(sized),
        products=len(products),
        tiles=tiles,
        rehearsal=partial(_rehearsing, rehearse, tiles),
    )


@contextmanager
def _rehearsing(rehearse: Callable[..., object], tiles: Tiles) -> Iterator[None]:
    begin = tiles.data.ctypes.data
    with _ONE_REHEARSAL:
        rehearse(ctypes.c_void_p(begin), ctypes.c_void_p(begin + tiles.data.nbytes))
        try:
            yield
        finally:
            rehearse(None, None)


def _operation(
    core: Library, native: NativeLibrary
) -> tuple[Callable[..., Library], Callable[..., object]]:
    """What makes nodes of the native operation, and `tidegate_openvino_rehearse`."""
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    try:
        core.add_extension(str(native.operation))
        factory.add_extension(str(native.operation))
        rehearse = ctypes.CDLL(str(native.operation)).tidegate_openvino_rehearse
    except Exception as error:
        raise NativeUnavailable(f"{native.operation} cannot be loaded: {error}") from error
    return factory.create, rehearse


def _products(model: Library) -> list[_Product]:
    found = [_product(node) for node in model.get_ordered_ops() if _is(node, "MatMul")]
    return [product for product in found if product is not None]


def _product(matmul: Library) -> _Product | None:
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
    return _Product(
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


def _dims(node: Library) -> list[int]:
    return list(node.get_output_shape(0))


def _type(node: Library) -> str:
    return str(node.get_output_element_type(0).to_string())


def _is(node: Library, kind: str) -> bool:
    return bool(node.get_type_name() == kind)


def _write_tiles(native: NativeLibrary, product: _Product, out: Bytes) -> None:
    native.tile(product.shape, product.values, product.scales, _zeros_by_row(product), out)
    forget_pages(product.values)


def _zeros_by_row(product: _Product) -> Bytes | None:
    """Zero-points with every row beginning on a byte."""
    shape, packed = product.shape, product.zeros
    groups = shape.inputs // shape.group
    if packed is None or shape.bits == 8 or groups % 2 == 0:
        return packed
    single = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[: shape.outputs * groups]
    even = np.pad(single.reshape(shape.outputs, groups), ((0, 0), (0, 1)))
    return np.asarray(even[:, 0::2] | even[:, 1::2] << 4)


def _swap(product: _Product, tiles: Bytes, create: Callable[..., Library]) -> None:
    import openvino.opset13 as op

    matmul, shape = product.matmul, product.shape
    inputs = [matmul.input_value(0), op.constant(tiles, shared_memory=True).output(0)]
    end, bias = _biased(matmul, shape.outputs)
    if bias is not None:
        inputs.append(op.constant(bias).output(0))
    attributes = {
        "inputs": shape.inputs,
        "outputs": shape.outputs,
        "bits": shape.bits,
        "group": shape.group,
        "zeros": int(shape.zeros),
    }
    node = create("PackedLinear", inputs, attributes)
    node.set_friendly_name(matmul.get_friendly_name())
    end.output(0).replace(node.output(0))


def _biased(matmul: Library, outputs: int) -> tuple[Library, Any]:
    """The last node of the product, and its bias if it has one."""
    users = list(matmul.output(0).get_target_inputs())
    add = users[0].get_node() if len(users) == 1 else None
    if add is None or not _is(add, "Add"):
        return matmul, None
    bias = add.input_value(1).get_node()
    if not _is(bias, "Constant") or list(bias.get_output_shape(0)) != [1, outputs]:
        return matmul, None
    return add, np.array(bias.data, np.float32).reshape(-1)
