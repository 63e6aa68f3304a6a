"""`load_weights`: a model's weights to a device, in the order of the walk, one product at a time.

Packed weights stay packed and are tiled on the device, or lie in rows where weights and activations
have 8 bits; the head's and those of experts are always tiled. Those that share their input are
merged where they are packed alike. A packed embedding table stays packed: in rows, or as the tiles
of the head that it is too. Dense weights of 16 bits go to the device as the bits that they are in
the file, and are looked through there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from tidegate.errors import CheckpointError, ConfigError
from tidegate.kernels.device_weights import MERGED, DeviceWeights, Product
from tidegate.kernels.linear.int8 import Int8Linear
from tidegate.kernels.linear.retile import can_merge, packed_to_gpu, to_gpu
from tidegate.kernels.linear.weights import DenseWeight, GpuLinear, TiledLinear
from tidegate.kernels.linear.workspace import single_weights
from tidegate.kernels.moe.weights import ExpertWeights, stack_experts
from tidegate.kernels.pointwise.table import PackedTable, Table
from tidegate.model.architecture import Architecture
from tidegate.model.ops import GatedMlp
from tidegate.model.packed import Array, DenseLinear, Linear, PackedLinear, dense_weight
from tidegate.model.roles import Role, roles
from tidegate.model.stored import HasStored, StoredLinear
from tidegate.model.walk import Weights

Tensor = torch.Tensor


@runtime_checkable
class MadeOnDevice(Protocol):
    """Weights that are nowhere yet, such as random ones."""

    def made(
        self, names: Sequence[str], *, dtype: torch.dtype, device: torch.device | str
    ) -> GpuLinear | None:
        """The weights of some roles, one behind the other; None for those that are read."""


def load_weights(
    arch: Architecture,
    source: Weights,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    head_part: Callable[[Linear], Linear] | None = None,
    int8_activations: bool = False,
) -> DeviceWeights:
    """Read every role of `arch` once and put it on the device.

    Args:
        arch: the model.
        source: may be closed afterwards.
        dtype: of weights that are not packed, and of the activations; norms are float32.
        device: where they go.
        head_part: what of a tied table this device's head is; None for all of it.
        int8_activations: 8-bit weights are multiplied with activations rounded to 8 bits.

    Raises:
        ConfigError: a weight is packed in groups that the kernels do not have, or 8-bit activations
            are asked for and no weight takes them.
        CheckpointError: a weight cannot be read, or is not finite.
    """
    loading = _Loading(
        arch=arch,
        source=source,
        dtype=dtype,
        device=device,
        head_part=head_part,
        int8_activations=int8_activations,
    )
    found = loading.run()
    eight = any(isinstance(one, Int8Linear) for one in single_weights(found.products()))
    if int8_activations and not eight:
        raise ConfigError("int8_activations", True, "off for a model without 8-bit linear layers")
    return found


@dataclass(frozen=True, kw_only=True)
class _Loading:
    arch: Architecture
    source: Weights
    dtype: torch.dtype
    device: torch.device | str
    head_part: Callable[[Linear], Linear] | None
    int8_activations: bool

    def run(self) -> DeviceWeights:
        found, known = DeviceWeights(dtype=self.dtype), roles(self.arch)
        for names in _groups(known):
            role = known[names[0]]
            if ".experts." in names[0]:
                self._name(found, names, known)  # they are read with their router
            elif role.is_linear:
                self._linears(found, names, known)
            else:
                weight = torch.from_numpy(self.source.vector(names[0])).float()
                found.add_norm(names[0], weight.to(self.device))
        return found

    def _linears(self, found: DeviceWeights, names: Sequence[str], known: dict[str, Role]) -> None:
        shells = self._name(found, names, known)
        if isinstance(self.source, MadeOnDevice):
            weight = self.source.made(names, dtype=self.dtype, device=self.device)
            if weight is not None:
                self._add_made(found, names, shells, weight)
                return
        stored = self._stored(names)
        if stored is not None:
            self._add_stored(found, names, shells, stored)
            return
        linears = [self.source.linear(name) for name in names]
        if names[0] == "embed":
            self._embedding(found, shells[0], linears[0])
        elif len(names) == 1 or can_merge(linears):
            found.add_product(shells, self._product(names, linears))
        else:
            for name, shell, linear in zip(names, shells, linears, strict=True):
                found.add_product([shell], self._product([name], [linear]))
        if names[0].endswith(".router"):
            found.add_experts(shells[0], self._experts(names[0].removesuffix("router")))

    def _add_made(
        self,
        found: DeviceWeights,
        names: Sequence[str],
        shells: Sequence[Linear],
        weight: GpuLinear,
    ) -> None:
        tails = [name.rpartition(".")[2] for name in names]
        product = Product(
            weight=weight,
            outputs=tuple(shell.outputs for shell in shells),
            purpose="head" if names[0] == "embed" else "+".join(tails),
            partial=tails[0] in _PARTIAL,
        )
        if names[0] != "embed" or self.arch.tied_head:
            found.add_product(shells, product)
        if names[0] == "embed":
            assert isinstance(weight, DenseWeight), "a table that was made has rows"
            found.add_table(shells[0], weight.weight)

    def _stored(self, names: Sequence[str]) -> list[StoredLinear] | None:
        """The weights as they lie in the file, when that is all that is needed of them."""
        whole_table = self.head_part is None or not self.arch.tied_head
        plain = names[0] != "embed" or whole_table
        if not isinstance(self.source, HasStored) or names[0].endswith(".router") or not plain:
            return None
        found = [self.source.stored(name) for name in names]
        whole = [one for one in found if one is not None]
        return whole if len(whole) == len(found) else None

    def _add_stored(
        self,
        found: DeviceWeights,
        names: Sequence[str],
        shells: Sequence[Linear],
        stored: Sequence[StoredLinear],
    ) -> None:
        weights = [self._bits(name, one) for name, one in zip(names, stored, strict=True)]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        if names[0] != "embed" or self.arch.tied_head:
            biases = None
            if any(one.bias is not None for one in stored):
                sizes = [len(one.values) for one in stored]
                biases = torch.cat(
                    [
                        torch.zeros(size, dtype=self.dtype, device=self.device)
                        if one.bias is None
                        else self._moved(one.bias)
                        for one, size in zip(stored, sizes, strict=True)
                    ]
                )
            tails = [name.rpartition(".")[2] for name in names]
            product = Product(
                weight=DenseWeight(weight=weight, bias=biases),
                outputs=tuple(len(one.values) for one in stored),
                purpose="head" if names[0] == "embed" else "+".join(tails),
                partial=tails[0] in _PARTIAL,
            )
            found.add_product(shells, product)
        if names[0] == "embed":  # behind the head that it may be, whose bytes are counted once
            found.add_table(shells[0], weight)

    def _bits(self, name: str, stored: StoredLinear) -> Tensor:
        kind = torch.bfloat16 if stored.bfloat else torch.float16
        weight = torch.from_numpy(stored.values.view(np.int16)).to(self.device).view(kind)
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"{name}: holds numbers that are not finite")
        return weight.to(self.dtype)

    def _name(
        self, found: DeviceWeights, names: Sequence[str], known: dict[str, Role]
    ) -> list[Linear]:
        return [found.name_linear(name, _two(known[name].shape)) for name in names]

    def _product(self, names: Sequence[str], linears: Sequence[Linear]) -> Product:
        tails = [name.rpartition(".")[2] for name in names]
        return Product(
            weight=self._merged(
                linears, int8_activations=self.int8_activations and names[0] != "head"
            ),
            outputs=tuple(one.outputs for one in linears),
            purpose="+".join(tails),
            partial=tails[0] in _PARTIAL,
        )

    def _merged(self, linears: Sequence[Linear], *, int8_activations: bool) -> GpuLinear:
        """One weight of several that can be merged, or of one."""
        if len(linears) == 1:
            return to_gpu(
                linears[0],
                device=self.device,
                dtype=self.dtype,
                int8_activations=int8_activations,
            )
        packed = [one for one in linears if isinstance(one, PackedLinear)]
        if packed:
            return packed_to_gpu(packed, device=self.device, int8_activations=int8_activations)
        dense = [one for one in linears if isinstance(one, DenseLinear)]
        weights = [self._moved(one.weight) for one in dense]
        if all(one.bias is None for one in dense):
            return DenseWeight(weight=torch.cat(weights))
        biases = [
            torch.zeros(one.outputs, dtype=self.dtype, device=self.device)
            if one.bias is None
            else self._moved(one.bias)
            for one in dense
        ]
        return DenseWeight(weight=torch.cat(weights), bias=torch.cat(biases))

    def _embedding(self, found: DeviceWeights, shell: Linear, table: Linear) -> None:
        """The table to look up in, and the head where it is the same."""
        rows: Table | None = None
        if self.arch.tied_head:
            part = table if self.head_part is None else self.head_part(table)
            product = self._product(["head"], [part])
            found.add_product([shell], product)
            if part is table and isinstance(product.weight, DenseWeight):
                rows = product.weight.weight
            elif part is table and isinstance(product.weight, TiledLinear):
                rows = product.weight
        if rows is None and isinstance(table, PackedLinear):
            rows = PackedTable.of(table, self.device)
        found.add_table(shell, self._moved(dense_weight(table)) if rows is None else rows)

    def _experts(self, prefix: str) -> ExpertWeights:
        experts = self.arch.kind(int(prefix.split(".")[1])).experts
        assert experts is not None, "a router has experts"
        mlps = []
        for number in range(experts.count):
            gate, up, down = (
                self.source.linear(f"{prefix}experts.{number}.{part}")
                for part in ("gate", "up", "down")
            )
            mlps.append(GatedMlp(gate=gate, up=up, down=down))
        return stack_experts(mlps, device=self.device, dtype=self.dtype)

    def _moved(self, values: Array) -> Tensor:
        return torch.from_numpy(values).to(device=self.device, dtype=self.dtype)


_PARTIAL = ("o", "down")
"""Products along what a group of devices has split."""


def _groups(known: dict[str, Role]) -> Iterator[tuple[str, ...]]:
    """The roles in order, those that are merged together."""
    followers = {one for group in MERGED for one in group[1:]}
    heads = {group[0]: group for group in MERGED}
    for name in known:
        prefix, _, tail = name.rpartition(".")
        if tail in heads:
            yield tuple(f"{prefix}.{part}" for part in heads[tail])
        elif tail not in followers:
            yield (name,)


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns
