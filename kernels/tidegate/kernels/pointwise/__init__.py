"""Kernels that touch every value once: norms, activations, row gathers. `reference` defines them.

Values are [T, width], rows of tokens: the last axis is contiguous, rows may be further apart (a
slice of a wider tensor). Everything is computed in float32 and rounded once. With `out` given a
wrapper allocates nothing. Differences to the reference are those of float32 sums.
"""

from __future__ import annotations

import torch
import triton

from tidegate.kernels.launch import gpu_of, launch_for
from tidegate.kernels.linear.rows import tiled_rows
from tidegate.kernels.linear.weights import TiledLinear
from tidegate.kernels.pointwise.elementwise import adjust_values, gate_rows
from tidegate.kernels.pointwise.norm import norm_long_rows, norm_rows
from tidegate.kernels.pointwise.rows import copy_rows, unpack_rows
from tidegate.kernels.pointwise.table import PackedTable, Table, table_width
from tidegate.model.architecture import Activation

__all__ = ["PackedTable", "adjust", "embed_rows", "gated_activation", "gather_rows", "rms_norm"]

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


def gated_activation(gate_up: Tensor, act: Activation, *, out: Tensor | None = None) -> Tensor:
    """`act(gate) * up`: SwiGLU and GeGLU (Shazeer 2020).

    Args:
        gate_up: [T, 2 * inner], the gate's values before those of up.
        act: applied to the gate.
        out: [T, inner] for the result.

    Returns:
        [T, inner] in gate_up's dtype, or that of `out`.
    """
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner) if out is None else out
    assert gate_up.stride(1) == out.stride(1) == 1, "rows are contiguous"
    launch = launch_for("pointwise", "gated_activation", gpu_of(gate_up.device))
    block = launch["values_per_program"]
    if rows:
        gate_rows[(rows, triton.cdiv(inner, block))](
            gate_up, out, inner, gate_up.stride(0), out.stride(0),
            ACT=act, BLOCK=block, num_warps=launch["num_warps"],
        )  # fmt: skip
    return out


def adjust(
    x: Tensor,
    *,
    factor: float = 1.0,
    limit: float | None = None,
    cap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`x * factor`, then cut to [-limit, limit], then `cap * tanh(x / cap)`; one pass for all.

    Args:
        x: any shape, contiguous.
        factor: 1 changes nothing.
        limit: of the cut; None for none.
        cap: of the soft cap; None for none.
        out: like x, for the result; may be `x`.
    """
    out = torch.empty_like(x) if out is None else out
    assert x.is_contiguous(), "values lie one after another"
    assert out.is_contiguous(), "values lie one after another"
    launch = launch_for("pointwise", "adjust", gpu_of(x.device))
    block = launch["values_per_program"]
    if x.numel():
        adjust_values[(triton.cdiv(x.numel(), block),)](
            x, out, x.numel(), float(factor), float(limit or 0), float(cap or 1),
            LIMITED=limit is not None, CAPPED=cap is not None,
            BLOCK=block, num_warps=launch["num_warps"],
        )  # fmt: skip
    return out


def embed_rows(
    table: Table,
    tokens: Tensor,
    *,
    factor: float = 1.0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rows of an embedding table, dequantised as they are read, times a factor.

    Args:
        table: [V, width], packed, or tiles (without a factor).
        tokens: int32 or int64 [T], from 0 to V - 1.
        factor: what some models multiply embeddings by.
        dtype: of the result; without it the table's, float32 of a packed one.
        out: [T, width] for the result.

    Returns:
        [T, width] in `dtype`, or that of `out`.
    """
    width = table_width(table)
    own = table.dtype if isinstance(table, Tensor) else torch.float32
    if out is None:
        out = torch.empty(len(tokens), width, dtype=dtype or own, device=tokens.device)
    launch = launch_for("pointwise", "embed_rows", gpu_of(tokens.device))
    block, warps = launch["values_per_program"], launch["num_warps"]
    grid = (len(tokens), triton.cdiv(width, block))
    if not len(tokens):
        return out
    if isinstance(table, TiledLinear):
        assert factor == 1, "rows of tiles come as they are"
        return tiled_rows(table, tokens, out.dtype, out=out)
    if isinstance(table, PackedTable):
        unpack_rows[grid](
            table.values, table.scales, table.zeros, tokens, out, float(factor), out.stride(0),
            WIDTH=width, GROUPS=table.scales.shape[1], GROUP_SIZE=table.group_size,
            BITS=table.bits, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        return out
    copy_rows[grid](
        table, tokens, out, float(factor), table.stride(0), out.stride(0),
        WIDTH=width, SCALED=factor != 1, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


def gather_rows(x: Tensor, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Row `rows[i]` of x as row `i`: the tokens whose logits are wanted.

    Args:
        x: [T, width].
        rows: int32 or int64 [R], from 0 to T - 1.
        out: [R, width] for the result; not `x`.
    """
    return embed_rows(x, rows, out=out)
