"""8-bit weights with 8-bit activations: how they lie, and the two halves of the product in torch.

Activations are rounded per token, to -127..127 of the largest magnitude over 127; weights are the
integers of a `PackedLinear` less 128, in rows, padded to whole steps. A step of inputs has one
scale for each output, so its product is exact in int32 and the scales meet in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def int8_linear(packed: PackedLinear, *, device: torch.device | str = "cpu") -> Int8Linear:
    """Bring an 8-bit layer to `device`.

    Raises:
        ConfigError: it has 4 bits, or groups that are neither a multiple of 32 nor the whole row.
    """
    if packed.bits != 8:
        raise ConfigError("bits", packed.bits, "8, for 8-bit activations")
    whole = packed.groups == 1
    sizes = [step for step in STEPS if whole or packed.group_size % step == 0]
    if not sizes:
        raise ConfigError("group_size", packed.group_size, "a multiple of 32, or the whole row")
    step = next((step for step in sizes if step <= packed.inputs), sizes[-1])
    integers = torch.from_numpy(packed.values).to(device).flatten(1)[:, : packed.inputs]
    values = (integers.to(torch.int16) - 128).to(torch.int8)
    repeated = -(-packed.group_size // step)
    scales = torch.from_numpy(packed.scales).to(device).repeat_interleave(repeated, dim=1)
    shifts = None
    if packed.zeros is not None:
        away = 128 - torch.from_numpy(packed.zeros).to(device, torch.float32)
        shifts = away.repeat_interleave(repeated, dim=1)
    padding = -packed.inputs % step
    steps = (packed.inputs + padding) // step
    bias = None if packed.bias is None else torch.from_numpy(packed.bias).to(device)
    return Int8Linear(
        values=functional.pad(values, (0, padding)),
        scales=scales[:, :steps].T.contiguous(),
        shifts=None if shifts is None else shifts[:, :steps].T.contiguous(),
        bias=bias,
        inputs=packed.inputs,
        step=step,
    )


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
