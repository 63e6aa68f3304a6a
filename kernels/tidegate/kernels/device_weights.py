"""Weights on the device: streamed there role by role, and found again by what the walk is given.

The host holds one tensor at a time. What the walk gets for a role is a name without numbers (an
array of the right shape and no memory, NaN wherever somebody looks), and a lowering looks up by it
what lies on the device. Weights that share their input are merged while they are read: query, key
and value; gate and up; all experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tidegate.kernels.linear.int8 import Int8Linear
from tidegate.kernels.linear.weights import DenseWeight, GpuLinear, LowRankWeight, TiledLinear
from tidegate.kernels.moe.weights import ExpertWeights
from tidegate.kernels.pointwise.table import Table
from tidegate.model.packed import Array, DenseLinear, Linear

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Product:
    """One product with the weights of several roles, their outputs one after another."""

    weight: GpuLinear
    outputs: tuple[int, ...]
    purpose: str
    """What it is of, as `q+k+v`: the name of its result's buffer."""
    partial: bool = False
    """It is a part of the sum over the devices of a group."""


MERGED = (("q", "k", "v"), ("gate", "up"))
"""Roles of a layer that share their input."""


class DeviceWeights:
    """`tidegate.model.walk.Weights` whose numbers lie on a device."""

    def __init__(self, *, dtype: torch.dtype = torch.float32) -> None:
        """Begin with none, for activations of `dtype`; `load_weights` fills it."""
        self.dtype = dtype
        self._linears: dict[str, Linear] = {}
        self._vectors: dict[str, Array] = {}
        self._products: dict[tuple[int, ...], Product] = {}
        self._norms: dict[int, Tensor] = {}
        self._tables: dict[int, Table] = {}
        self._experts: dict[int, ExpertWeights] = {}
        self.nbytes = 0
        """Of all numbers on the device."""

    def linear(self, role: str) -> Linear:
        """See `Weights`; a name without numbers."""
        return self._linears[role]

    def vector(self, role: str) -> Array:
        """See `Weights`; a name without numbers."""
        return self._vectors[role]

    def product(self, linears: Sequence[Linear]) -> Product | None:
        """The merged product of these weights; None if they are not merged."""
        return self._products.get(tuple(id(one) for one in linears))

    def products(self) -> Iterator[GpuLinear]:
        """Every weight that is multiplied with, experts left out."""
        return (one.weight for one in self._products.values())

    def norm(self, weight: Array) -> Tensor:
        """The float32 weight [width] of a norm."""
        return self._norms[id(weight)]

    def table(self, linear: Linear) -> Table:
        """An embedding table."""
        return self._tables[id(linear)]

    def experts(self, router: Linear) -> ExpertWeights:
        """The experts that a router chooses among."""
        return self._experts[id(router)]

    def some_experts(self) -> ExpertWeights | None:
        """Those of one layer, which all others are like; None in a model without."""
        return next(iter(self._experts.values()), None)

    def name_linear(self, role: str, shape: tuple[int, int]) -> Linear:
        """Make the name of a linear layer."""
        nothing = np.broadcast_to(np.float32(np.nan), shape)
        name = self._linears[role] = DenseLinear(weight=nothing)
        return name

    def add_norm(self, role: str, weight: Tensor) -> None:
        """Keep a norm's weight."""
        name = self._vectors[role] = np.broadcast_to(np.float32(np.nan), (len(weight),))
        self._norms[id(name)] = weight
        self.nbytes += weight.nbytes

    def add_product(self, names: Sequence[Linear], product: Product) -> None:
        """Keep a product of the weights that `names` stand for."""
        self._products[tuple(id(name) for name in names)] = product
        self.nbytes += weight_nbytes(product.weight)

    def add_table(self, name: Linear, table: Table) -> None:
        """Keep an embedding table, which may be the weight of a product too."""
        self._tables[id(name)] = table
        products = (one.weight for one in self._products.values())
        if not any(
            one is table or (isinstance(one, DenseWeight) and one.weight is table)
            for one in products
        ):
            self.nbytes += table.nbytes

    def add_experts(self, router: Linear, experts: ExpertWeights) -> None:
        """Keep the experts of a layer."""
        self._experts[id(router)] = experts
        parts = (experts.gate, experts.up, experts.down)
        self.nbytes += sum(weight_nbytes(part) for part in parts)


def weight_nbytes(weight: GpuLinear) -> int:
    """Of a weight on the device, its bias included."""
    match weight:
        case LowRankWeight():
            return weight_nbytes(weight.first) + weight_nbytes(weight.second)
        case TiledLinear() | Int8Linear():
            return weight.nbytes + _of(weight.bias)
        case DenseWeight():
            return weight.weight.nbytes + _of(weight.bias)


def _of(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.nbytes
