"""8-bit weights with 8-bit activations: how they lie, and the two halves of the product in torch.

Activations are rounded per token, to -127..127 of the largest magnitude over 127; weights are the
integers of a `PackedLinear` less 128, in rows, padded to whole steps. A step of inputs has one
scale for each output, so its product is exact in int32 and the scales meet in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from tidegate.errors import ConfigError
from tidegate.model.packed import PackedLinear

Tensor = torch.Tensor
STEPS = (128, 64, 32)
"""Inputs that have a scale in common, best first; 32 are one int8 matrix instruction's."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Int8Linear:
    """A weight for `w8a8_linear`; see the module."""

    values: Tensor
    """int8 [out, steps * step]: integers less 128."""
    scales: Tensor
    """float32 [steps, out]."""
    shifts: Tensor | None
    """float32 [steps, out]: 128 less the zero-point; None when all are 0."""
    bias: Tensor | None
    """float32 [out]."""
    inputs: int
    step: int

    @property
    def outputs(self) -> int:
        """Rows of the weight."""
        return int(self.values.shape[0])

    @property
    def padded(self) -> int:
        """Inputs of whole steps."""
        return int(self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weight reads."""
        parts = (self.values, self.scales, self.shifts)
        return sum(part.nbytes for part in parts if part is not None)


def int8_linear(packed: PackedLinear, *, device: torch.device | str = "cpu") -> Int8Linear:
    """Bring an 8-bit layer to `device`; see `merged_int8`."""
    return merged_int8([packed], device=device)


def merged_int8(
    linears: Sequence[PackedLinear], *, device: torch.device | str = "cpu"
) -> Int8Linear:
    """Bring 8-bit layers with the same input to `device`, their rows one behind the other.

    Raises:
        ConfigError: they have 4 bits, or groups that are neither a multiple of 32 nor the whole
            row.
    """
    first = linears[0]
    if first.bits != 8:
        raise ConfigError("bits", first.bits, "8, for 8-bit activations")
    step = _step(first)
    padding = -first.inputs % step
    steps, repeated = (first.inputs + padding) // step, -(-first.group_size // step)

    def per_step(groups: Tensor) -> Tensor:
        """A number per group as one per step, [steps, out]."""
        return groups.to(device).repeat_interleave(repeated, dim=1)[:, :steps].T

    values, shifts = [], []
    for linear in linears:
        integers = torch.from_numpy(linear.values).to(device).flatten(1)[:, : first.inputs]
        values.append(functional.pad((integers.to(torch.int16) - 128).to(torch.int8), (0, padding)))
        zeros = (
            np.full(linear.scales.shape, 128, np.uint8) if linear.zeros is None else linear.zeros
        )
        shifts.append(per_step(128 - torch.from_numpy(zeros).float()))
    symmetric = all(linear.zeros is None for linear in linears)
    scales = [per_step(torch.from_numpy(linear.scales)) for linear in linears]
    return Int8Linear(
        values=torch.cat(values),
        scales=torch.cat(scales, dim=1).contiguous(),
        shifts=None if symmetric else torch.cat(shifts, dim=1).contiguous(),
        bias=biases_of(linears, device),
        inputs=first.inputs,
        step=step,
    )


def _step(packed: PackedLinear) -> int:
    whole = packed.groups == 1
    sizes = [step for step in STEPS if whole or packed.group_size % step == 0]
    if not sizes:
        allowed = "a multiple of 32, or the whole row, for 8-bit activations"
        raise ConfigError("group_size", packed.group_size, allowed)
    return next((step for step in sizes if step <= packed.inputs), sizes[-1])


def biases_of(linears: Sequence[PackedLinear], device: torch.device | str) -> Tensor | None:
    """All the biases, float32 [out]; 0 for layers without one, None when no layer has one."""
    if all(linear.bias is None for linear in linears):
        return None
    parts = [
        torch.zeros(linear.outputs) if linear.bias is None else torch.from_numpy(linear.bias)
        for linear in linears
    ]
    return torch.cat(parts).to(device, torch.float32)


def int8_matrix(weight: Int8Linear) -> Tensor:
    """The weight that the integers stand for, float32 [out, in]."""
    steps = weight.scales.shape[0]
    values = weight.values.view(weight.outputs, steps, weight.step).float()
    if weight.shifts is not None:
        values = values + weight.shifts.T[..., None]
    return (values * weight.scales.T[..., None]).flatten(1)[:, : weight.inputs]


def reference_quantise(x: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    """Rows of int8 [T, padded] with 0 beyond the inputs, and their scales, float32 [T]."""
    wide = x.float()
    scales = wide.abs().amax(dim=1).clamp(min=1e-30) / 127
    rounded = torch.round(wide * (1 / scales)[:, None]).to(torch.int8)
    return functional.pad(rounded, (0, padded - x.shape[1])), scales


def reference_w8a8(x: Tensor, weight: Int8Linear) -> Tensor:
    """The product as `w8a8_linear` defines it, [T, out] in the type of `x`."""
    rows, scales = reference_quantise(x, weight.padded)
    steps = weight.scales.shape[0]
    integers = rows.view(len(x), steps, weight.step).long()
    values = weight.values.view(weight.outputs, steps, weight.step).long()
    # Not einsum: torch has no integer product of three dimensions on every device.
    products = torch.stack([integers[:, s] @ values[:, s].T for s in range(steps)]).float()
    if weight.shifts is not None:
        products += integers.sum(dim=2).T[:, :, None] * weight.shifts[:, None]
    sums = (products * weight.scales[:, None]).sum(dim=0) * scales[:, None]
    return (sums if weight.bias is None else sums + weight.bias).to(x.dtype)
