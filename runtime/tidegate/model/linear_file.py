"""How a linear layer lies in a safetensors file: as named tensors, laid out before it is made.

<role>:values  <role>:scales  <role>:zeros      packed; its `PackedForm` is kept beside
                              <role>:zeros4     zero-points two to a byte, as in a bundle
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
from tidegate.model.cuts import WHOLE, Cut, Span, read_cut
from tidegate.model.packed import (
    Array,
    Bits,
    Bytes,
    DenseLinear,
    Linear,
    LowRankLinear,
    PackedLinear,
    unpack_nibbles,
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

    @property
    def groups(self) -> int:
        """Groups along the input."""
        return -(-self.inputs // self.group_size)

    @property
    def group_bytes(self) -> int:
        """Of the values of one group."""
        return -(-self.group_size * self.bits // 8)


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
    groups = form.groups
    layouts: dict[str, Layout] = {
        f"{name}:values": (BYTE, (outputs, groups, form.group_bytes)),
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


def read_linear(
    file: SafetensorsFile, name: str, forms: Mapping[str, PackedForm], cut: Cut = WHOLE
) -> Linear:
    """Read back what was stored under `name`, or what `cut` keeps of it.

    Columns of a packed weight must be whole groups, see `keeps_groups`.

    Raises:
        CheckpointError: a tensor is missing, or the file cannot be read any more.
    """
    if is_low_rank(name, file.entries, forms):
        inner, outer = Cut(columns=cut.columns), Cut(rows=cut.rows)
        first = read_linear(file, f"{name}:first", forms, inner)
        second = read_linear(file, f"{name}:second", forms, outer)
        assert not isinstance(first, LowRankLinear)
        assert not isinstance(second, LowRankLinear)
        return LowRankLinear(first=first, second=second)
    bias = None
    if f"{name}:bias" in file.entries:
        bias = file.read(f"{name}:bias", cut.rows)
    if name not in forms:
        return DenseLinear(weight=_read(file, f"{name}:weight", cut), bias=bias)
    form = forms[name]
    groups = cut.times(form.group_size)
    first_input, last_input = cut.columns or (0, form.inputs)
    return PackedLinear(
        values=_read_bytes(file, f"{name}:values", groups),
        scales=_read(file, f"{name}:scales", groups),
        zeros=_read_zeros(file, name, form, groups),
        bias=bias,
        inputs=last_input - first_input,
        bits=form.bits,
        group_size=form.group_size,
    )


def is_low_rank(
    name: str, entries: Mapping[str, TensorEntry], forms: Mapping[str, PackedForm]
) -> bool:
    """Whether two factors are stored under `name`."""
    return f"{name}:first:weight" in entries or f"{name}:first" in forms


def keeps_groups(name: str, forms: Mapping[str, PackedForm], cut: Cut) -> bool:
    """Whether `cut` leaves every group of a stored weight whole."""
    form = forms.get(name) or forms.get(f"{name}:first")
    if cut.columns is None or form is None:
        return True
    first, last = cut.columns
    size = form.group_size
    return first % size == 0 and (last % size == 0 or last == form.inputs)


def _read(file: SafetensorsFile, name: str, cut: Cut) -> Array:
    return read_cut(lambda span: file.read(name, span), _rows(file, name), cut)


def _read_bytes(file: SafetensorsFile, name: str, cut: Cut) -> Bytes:
    def read(span: Span) -> Bytes:
        return file.read_raw(name, span).astype(np.uint8, copy=False)

    return read_cut(read, _rows(file, name), cut)


def _read_zeros(file: SafetensorsFile, name: str, form: PackedForm, groups: Cut) -> Bytes | None:
    if f"{name}:zeros" in file.entries:
        return _read_bytes(file, f"{name}:zeros", groups)
    if f"{name}:zeros4" not in file.entries:
        return None
    packed = _read_bytes(file, f"{name}:zeros4", Cut(rows=groups.rows))
    zeros = unpack_nibbles(packed, form.groups)
    return zeros if groups.columns is None else zeros[:, slice(*groups.columns)].copy()


def _rows(file: SafetensorsFile, name: str) -> int:
    entry = file.entries.get(name)
    if entry is None or not entry.shape:
        raise CheckpointError(f"{file.path.name}: has no tensor {name!r}")
    return entry.shape[0]


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
