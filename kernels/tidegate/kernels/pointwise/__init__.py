"""Kernels that touch every value once: norms, activations, row gathers. `reference` defines them.

Values are [T, width], rows of tokens: the last axis is contiguous, rows may be further apart (a
slice of a wider tensor). Everything is computed in float32 and rounded once. With `out` given a
wrapper allocates nothing. Differences to the reference are those of float32 sums.
"""

from __future__ import annotations

import torch
import triton

from tidegate.kernels.launch import gpu_of, launch_for
from tidegate.kernels.pointwise.norm import norm_long_rows, norm_rows
from tidegate.kernels.pointwise.table import PackedTable

__all__ = ["PackedTable", "rms_norm"]

Tensor = torch.Tensor

_ONE_PASS = 16384
"""The longest run that a program holds in registers: 32 values a thread at 16 warps."""


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x ** 2) + eps) * weight`, of the sum with the residual stream if there is one.

    Args:
        x: [T, width], any float; width is a multiple of len(weight).
        weight: [size], any float; the mean is over each run of `size` values of a row.
        eps: added to the mean.
        residual: [T, width]; becomes `residual + x`, in place.
        out: [T, width] for the result; may be `x`.

    Returns:
        The norm, in x's dtype (or that of `out`), and the residual stream: `residual`, or `x`.
    """
    rows, width = x.shape
    size = weight.shape[0]
    assert width % size == 0, f"rows of {width} values are not runs of {size}"
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    stream = x if residual is None else residual
    assert x.stride(1) == out.stride(1) == stream.stride(1) == 1, "rows are contiguous"
    runs_per_row = width // size
    runs = rows * runs_per_row
    if not runs:
        return out, stream
    strides = (x.stride(0), stream.stride(0), out.stride(0))
    launch = launch_for("pointwise", "rms_norm", gpu_of(x.device), columns=size)
    block, warps = triton.next_power_of_2(size), launch["num_warps"]
    if size > _ONE_PASS:
        norm_long_rows[(runs,)](
            x, residual, weight, out, runs_per_row, *strides, eps,
            SIZE=size, BLOCK=launch["values_per_program"], num_warps=warps,
        )  # fmt: skip
        return out, stream
    together = max(1, launch["values_per_program"] // block)
    norm_rows[(triton.cdiv(runs, together),)](
        x, residual, weight, out, runs, runs_per_row, *strides, eps,
        SIZE=size, RUNS=together, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out, stream
