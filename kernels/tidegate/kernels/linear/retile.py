"""Weights of a checkpoint or bundle made ready for the GPU, once, before anything is served.

`retile` reorders integers, it does not round again: `untile` gives back the same weight exactly.
Rows of layers that share an input lie one behind the other, so q, k and v, or gate and up, become
one layer whose output is cut up again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tidegate.errors import ConfigError
from tidegate.kernels.linear.int8 import biases_of, merged_int8
from tidegate.kernels.linear.weights import (
    STEPS,
    TILE_ROWS,
    Bits,
    DenseWeight,
    GpuLinear,
    LowRankWeight,
    Single,
    TiledLinear,
)
from tidegate.model.packed import DenseLinear, Linear, LowRankLinear, PackedLinear

Tensor = torch.Tensor
Device = torch.device | str


def to_gpu(
    linear: Linear, *, device: Device, dtype: torch.dtype, int8_activations: bool = False
) -> GpuLinear:
    """One layer on `device`, for activations of `dtype`; packed weights stay packed."""
    match linear:
        case PackedLinear():
            return packed_to_gpu([linear], device=device, int8_activations=int8_activations)
        case DenseLinear():
            bias = None if linear.bias is None else torch.from_numpy(linear.bias)
            return DenseWeight(
                weight=torch.from_numpy(linear.weight).to(device, dtype),
                bias=None if bias is None else bias.to(device, dtype),
            )
        case LowRankLinear():
            first, second = (
                to_gpu(part, device=device, dtype=dtype, int8_activations=int8_activations)
                for part in (linear.first, linear.second)
            )
            assert not isinstance(first, LowRankWeight)
            assert not isinstance(second, LowRankWeight)
            return LowRankWeight(first=first, second=second)


def packed_to_gpu(
    linears: Sequence[PackedLinear], *, device: Device, int8_activations: bool
) -> Single:
    """Packed layers with the same input, as one: in tiles, or in rows for 8-bit activations.

    Args:
        linears: that can be merged.
        device: where they go.
        int8_activations: 8-bit weights are multiplied with activations rounded to 8 bits.

    Raises:
        ConfigError: groups that the kernels do not have.
    """
    if int8_activations and linears[0].bits == 8:
        return merged_int8(linears, device=device)
    return retile(linears, device=device)


def can_merge(linears: Sequence[Linear]) -> bool:
    """Whether layers with the same input become one: all dense, or packed in the same way."""
    if all(isinstance(linear, DenseLinear) for linear in linears):
        return True
    packed = [linear for linear in linears if isinstance(linear, PackedLinear)]
    kinds = {(linear.bits, linear.group_size, linear.inputs) for linear in packed}
    return len(packed) == len(linears) and len(kinds) == 1


def retile(linears: Sequence[PackedLinear], *, device: Device = "cpu") -> TiledLinear:
    """Tile layers with the same input as one, their rows one behind the other.

    Args:
        linears: at least one; all of one width, group size and number of bits.
        device: where the tiles go. They are made there, one layer's integers at a time.

    Raises:
        ConfigError: groups that are neither a multiple of 16 nor the whole row.
        ValueError: layers that cannot be merged.
    """
    if not linears or not can_merge(linears):
        raise ValueError(f"{len(linears)} layers: must be alike in bits, group size and inputs")
    first = linears[0]
    step = _step(first)
    values = [_integers(linear, step, device) for linear in linears]
    scales = [_per_step(linear.scales, first, step, device) for linear in linears]
    zeros = [_per_step(_zeros(linear), first, step, device) for linear in linears]
    symmetric = all(linear.zeros is None for linear in linears)
    return TiledLinear(
        values=tile_values(torch.cat(values), step=step, bits=first.bits),
        scales=tile_rows(torch.cat(scales)),
        zeros=None if symmetric else tile_rows(torch.cat(zeros)),
        bias=biases_of(linears, device),
        inputs=first.inputs,
        outputs=sum(linear.outputs for linear in linears),
        bits=first.bits,
        step=step,
    )


def _step(linear: PackedLinear) -> int:
    """The widest tile inside a group; a whole row is padded and cut as is best."""
    if linear.groups == 1:
        return next((step for step in STEPS if step <= linear.inputs), STEPS[-1])
    step = next((step for step in STEPS if linear.group_size % step == 0), None)
    if step is None:
        raise ConfigError("group_size", linear.group_size, "a multiple of 16, or the whole row")
    return step


def _integers(linear: PackedLinear, step: int, device: Device) -> Tensor:
    """The integers, uint8 [out, steps * step]; what is beyond the inputs does not matter."""
    integers = torch.from_numpy(np.ascontiguousarray(linear.integers())).to(device).flatten(1)
    return torch.nn.functional.pad(integers, (0, -integers.shape[1] % step))


def _zeros(linear: PackedLinear) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    if linear.zeros is None:
        return np.full(linear.scales.shape, linear.symmetric_zero, np.float32)
    return linear.zeros.astype(np.float32)


def _per_step(
    groups: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    linear: PackedLinear,
    step: int,
    device: Device,
) -> Tensor:
    """A number per group as one per step, float16 [out, steps]."""
    steps = -(-linear.group_size // step)
    return torch.from_numpy(groups).to(device, torch.float16).repeat_interleave(steps, dim=1)


def tile_values(integers: Tensor, *, step: int, bits: Bits) -> Tensor:
    """Integers, uint8 [out, steps * step], as int32 [tiles, steps, words]."""
    padded = torch.nn.functional.pad(integers, (0, 0, 0, -len(integers) % TILE_ROWS))
    steps = padded.shape[1] // step
    low = min(step // 16, 4 if bits == 4 else 2)
    # rows: m54 m3 m210; inputs: step, high, low, k3, k21, k0.
    parts = padded.view(-1, 4, 2, 8, steps, step // (16 * low), low, 2, 4, 2)
    if bits == 4:
        nibbles = parts.permute(0, 4, 5, 1, 3, 8, 6, 9, 7, 2).flatten(2)
        packed = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    else:
        packed = parts.permute(0, 4, 5, 1, 3, 8, 6, 7, 9, 2).flatten(2)
    return packed.contiguous().view(torch.int32)


def tile_rows(numbers: Tensor) -> Tensor:
    """A float16 per row and step, [out, steps], as int32 [tiles, steps, 32]."""
    padded = torch.nn.functional.pad(numbers, (0, 0, 0, -len(numbers) % TILE_ROWS))
    parts = padded.view(-1, 4, 2, 8, padded.shape[1])
    pairs = parts.permute(0, 4, 1, 3, 2).contiguous()
    return pairs.view(torch.int32).flatten(2)


def untile(weight: TiledLinear) -> Tensor:
    """The weight that the tiles stand for, float32 [out, in]: `retile` undone, then scaled."""
    tiles, steps = weight.tiles, weight.steps
    low = min(weight.step // 16, 4 if weight.bits == 4 else 2)
    high = weight.step // (16 * low)
    stored = weight.values.view(torch.uint8)
    if weight.bits == 4:
        nibbles = torch.stack([stored & 15, stored >> 4], dim=-1)
        parts = nibbles.view(tiles, steps, high, 4, 8, 4, low, 2, 2, 2)
        integers = parts.permute(0, 3, 9, 4, 1, 2, 6, 8, 5, 7)
    else:
        parts = stored.view(tiles, steps, high, 4, 8, 4, low, 2, 2, 2)
        integers = parts.permute(0, 3, 9, 4, 1, 2, 6, 7, 5, 8)
    rows = integers.reshape(tiles * TILE_ROWS, steps, weight.step).float()
    zero = 1 << (weight.bits - 1) if weight.zeros is None else _untile_rows(weight.zeros)
    scaled = (rows - zero) * _untile_rows(weight.scales)
    return scaled.flatten(1)[: weight.outputs, : weight.inputs]


def _untile_rows(pairs: Tensor) -> Tensor:
    """`tile_rows` undone: float32 [tiles * 64, steps, 1]."""
    tiles, steps = pairs.shape[:2]
    parts = pairs.view(torch.float16).view(tiles, steps, 4, 8, 2)
    return parts.permute(0, 2, 4, 3, 1).reshape(tiles * TILE_ROWS, steps, 1).float()
