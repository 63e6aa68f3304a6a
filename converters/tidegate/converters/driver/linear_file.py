"""How a linear layer lies in a safetensors file: as named tensors, laid out before it is made.

<role>:values  <role>:scales  <role>:zeros      packed; bits and inputs are in the file's header
<role>:weight                                   dense
<role>:first:...  <role>:second:...             low rank
<role>:bias                                     with any of them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tidegate.errors import CheckpointError
from tidegate.model.packed import (
    Array,
    Bits,
    Bytes,
    DenseLinear,
    Linear,
    LowRankLinear,
    PackedLinear,
)
from tidegate.model.safetensors_file import SafetensorsFile
from tidegate.model.safetensors_header import TensorEntry
from tidegate.model.safetensors_writer import Layout

AnyArray = npt.NDArray[np.generic]

FLOAT, BYTE = np.dtype(np.float32), np.dtype(np.uint8)
SCALE_BYTES = 2
"""A bundle stores scales as float16; the file keeps them as float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedForm:
    """What the tensors of a packed weight do not say themselves."""

    bits: Bits
    inputs: int
    group_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The tensors that a linear layer will be stored as."""

    layouts: Mapping[str, Layout]
    forms: Mapping[str, PackedForm] = field(default_factory=dict)
    """Of each packed weight among them, by its name."""


def plan_of(name: str, linear: Linear) -> Plan:
    """How `linear` is stored under `name`."""
    match linear:
        case PackedLinear():
            form = PackedForm(bits=linear.bits, inputs=linear.inputs, group_size=linear.group_size)
            return plan_packed(
                name,
                linear.outputs,
                form,
                symmetric=linear.zeros is None,
                bias=linear.bias is not None,
            )
        case DenseLinear():
            return plan_dense(name, linear.weight.shape, bias=linear.bias is not None)
        case LowRankLinear():
            first = plan_of(f"{name}:first", linear.first)
            second = plan_of(f"{name}:second", linear.second)
            return both(first, second)


def plan_packed(name: str, outputs: int, form: PackedForm, *, symmetric: bool, bias: bool) -> Plan:
    """How a packed weight is stored that need not have been made yet."""
    groups = -(-form.inputs // form.group_size)
    row_bytes = -(-form.group_size * form.bits // 8)
    layouts: dict[str, Layout] = {
        f"{name}:values": (BYTE, (outputs, groups, row_bytes)),
        f"{name}:scales": (FLOAT, (outputs, groups)),
    }
    if not symmetric:
        layouts[f"{name}:zeros"] = (BYTE, (outputs, groups))
    if bias:
        layouts[f"{name}:bias"] = (FLOAT, (outputs,))
    return Plan(layouts=layouts, forms={name: form})


def plan_dense(name: str, shape: tuple[int, ...], *, bias: bool) -> Plan:
    """How a dense weight [out, in] is stored."""
    layouts: dict[str, Layout] = {f"{name}:weight": (FLOAT, shape)}
    if bias:
        layouts[f"{name}:bias"] = (FLOAT, shape[:1])
    return Plan(layouts=layouts)


def both(first: Plan, second: Plan) -> Plan:
    """Two plans side by side."""
    return Plan(layouts={**first.layouts, **second.layouts}, forms={**first.forms, **second.forms})


def tensors_of(name: str, linear: Linear) -> dict[str, AnyArray]:
    """The tensors that `plan_of` lays out."""
    if isinstance(linear, LowRankLinear):
        return tensors_of(f"{name}:first", linear.first) | tensors_of(
            f"{name}:second", linear.second
        )
    found: dict[str, AnyArray] = {}
    if isinstance(linear, DenseLinear):
        found[f"{name}:weight"] = linear.weight
    else:
        found[f"{name}:values"], found[f"{name}:scales"] = linear.values, linear.scales
        if linear.zeros is not None:
            found[f"{name}:zeros"] = linear.zeros
    if linear.bias is not None:
        found[f"{name}:bias"] = linear.bias
    return found


def read_linear(file: SafetensorsFile, name: str, forms: Mapping[str, PackedForm]) -> Linear:
    """Read back what was stored under `name`."""
    if f"{name}:first:weight" in file.entries or f"{name}:first" in forms:
        first = read_linear(file, f"{name}:first", forms)
        second = read_linear(file, f"{name}:second", forms)
        assert not isinstance(first, LowRankLinear)
        assert not isinstance(second, LowRankLinear)
        return LowRankLinear(first=first, second=second)
    bias = _floats(file, f"{name}:bias")
    if name not in forms:
        return DenseLinear(weight=file.read(f"{name}:weight"), bias=bias)
    form = forms[name]
    values = _bytes(file, f"{name}:values")
    if values is None:
        raise CheckpointError(f"{file.path.name}: has no tensor '{name}:values'")
    return PackedLinear(
        values=values,
        scales=file.read(f"{name}:scales"),
        zeros=_bytes(file, f"{name}:zeros"),
        bias=bias,
        inputs=form.inputs,
        bits=form.bits,
        group_size=form.group_size,
    )


def stored_bytes(entries: Mapping[str, TensorEntry], forms: Mapping[str, PackedForm]) -> int:
    """Bytes in a bundle of values, scales, zero-points, biases and norms together."""
    total = 0
    for tensor, entry in entries.items():
        name, _, part = tensor.rpartition(":")
        nbytes = entry.stop - entry.start
        if part == "scales":
            nbytes = nbytes * SCALE_BYTES // FLOAT.itemsize
        elif part == "zeros" and forms[name].bits == 4:
            rows, groups = entry.shape
            nbytes = rows * -(-groups // 2)
        total += nbytes if tensor[0] != ":" else 0
    return total


def _floats(file: SafetensorsFile, name: str) -> Array | None:
    return file.read(name) if name in file.entries else None


def _bytes(file: SafetensorsFile, name: str) -> Bytes | None:
    if name not in file.entries:
        return None
    return file.read_raw(name).astype(np.uint8, copy=False)
