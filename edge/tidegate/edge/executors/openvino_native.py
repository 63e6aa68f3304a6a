"""Swaps the products of an OpenVINO graph for native operations, in place and after reading.

The packed constants stay in the mapped file of the bundle, unread from then on; a table that is
gathered from as well goes on reading single rows of them. So weights are in memory once, as tiles.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tidegate.edge.executors.file_pages import forget_pages
from tidegate.edge.executors.native import Bytes, NativeLibrary, NativeUnavailable
from tidegate.edge.executors.native_place import Place, TilePlace
from tidegate.edge.executors.native_tiles import load_tiles, parts_of
from tidegate.edge.executors.openvino_products import (
    Library,
    Product,
    biased,
    find_gated_mlps,
    find_products,
)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Swapped:
    """What became of a graph."""

    native: int
    """Products that the native operation computes."""
    products: int
    """Products of packed weights there are."""
    gated: int
    """Gated MLPs: two of its products each, with what lies between, in one operation."""
    place: TilePlace
    """Must outlive every model compiled from the graph."""


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
    create, place = _operations(core, native)
    products = find_products(model)
    sizes = {product.name: native.tiled_bytes(product.shape) for product in products}
    able = [product for product in products if sizes[product.name]]
    if not able:
        raise NativeUnavailable(f"it can run none of the model's {len(products)} packed products")
    lengths = [sizes[product.name] for product in able]
    write = [partial(_write_tiles, native, product) for product in able]
    names = [f"{one.name}: {one.shape}" for one in able]
    tiles = load_tiles(names, lengths, write, native.digest, file)
    parts = parts_of(tiles.data, lengths)
    gated = _swap_all(able, {one.name: part for one, part in zip(able, parts, strict=True)}, create)
    return Swapped(
        native=len(able),
        products=len(products),
        gated=gated,
        place=TilePlace(tiles, place),
    )


def _operations(core: Library, native: NativeLibrary) -> tuple[Callable[..., Library], Place]:
    """What makes nodes of the native operations, and what says where they read their tiles."""
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    try:
        core.add_extension(str(native.operation))
        factory.add_extension(str(native.operation))
        place = ctypes.CDLL(str(native.operation)).tidegate_openvino_place
    except Exception as error:
        raise NativeUnavailable(f"{native.operation} cannot be loaded: {error}") from error
    return factory.create, place


def _write_tiles(native: NativeLibrary, product: Product, out: Bytes) -> None:
    native.tile(product.shape, product.values, product.scales, _zeros_by_row(product), out)
    forget_pages(product.values)


def _zeros_by_row(product: Product) -> Bytes | None:
    """Zero-points with every row beginning on a byte."""
    shape, packed = product.shape, product.zeros
    groups = shape.inputs // shape.group
    if packed is None or shape.bits == 8 or groups % 2 == 0:
        return packed
    single = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[: shape.outputs * groups]
    even = np.pad(single.reshape(shape.outputs, groups), ((0, 0), (0, 1)))
    return np.asarray(even[:, 0::2] | even[:, 1::2] << 4)


def _swap_all(
    products: Sequence[Product], tiles: Mapping[str, Bytes], create: Callable[..., Library]
) -> int:
    """One operation for every gated MLP and every product beside them; how many gated MLPs."""
    import openvino.opset13 as op

    places = {name: op.constant(part, shared_memory=True).output(0) for name, part in tiles.items()}
    rest = {product.name: product for product in products}
    mlps = find_gated_mlps(products)
    for mlp in mlps:
        for product in (mlp.gate_up, mlp.down):
            del rest[product.name]
        inputs = [
            mlp.gate_up.matmul.input_value(0),
            places[mlp.gate_up.name],
            places[mlp.down.name],
        ]
        attributes = _numbers(mlp.gate_up) | _numbers(mlp.down, "down_") | {"gate": mlp.gate}
        _replace(mlp.down.matmul, create("GatedMlp", inputs, attributes), mlp.down.name)
    for product in rest.values():
        end, bias = biased(product)
        inputs = [product.matmul.input_value(0), places[product.name]]
        if bias is not None:
            inputs.append(op.constant(bias).output(0))
        _replace(end, create("PackedLinear", inputs, _numbers(product)), product.name)
    return len(mlps)


def _numbers(product: Product, prefix: str = "") -> dict[str, int]:
    """A weight's attributes."""
    fields = asdict(product.shape)
    return {prefix + name: int(value) for name, value in fields.items()}


def _replace(end: Library, node: Library, name: str) -> None:
    node.set_friendly_name(name)
    end.output(0).replace(node.output(0))
