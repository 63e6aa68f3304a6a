"""`apply_linear`: a layer's product, by the kernel that suits the weight and the number of tokens.

Tiles up to some 500 tokens are multiplied as they are; beyond that reading them once more as a
dense matrix costs less than torch's matrix product gains. What is `deterministic` never depends on
the other rows of the step nor on how many there are.
"""

from __future__ import annotations

from typing import assert_never

import torch

from tidegate.kernels.launch import gpu_of, launch_for
from tidegate.kernels.linear.dequantise import dequantise
from tidegate.kernels.linear.few import launch_few, suits_few
from tidegate.kernels.linear.int8 import Int8Linear
from tidegate.kernels.linear.launching import launch_dense, launch_tiled
from tidegate.kernels.linear.plan import plan_product
from tidegate.kernels.linear.w8a8 import launch_w8a8
from tidegate.kernels.linear.weights import DenseWeight, GpuLinear, LowRankWeight, TiledLinear
from tidegate.kernels.linear.workspace import LinearWorkspace, workspace_for

Tensor = torch.Tensor


def apply_linear(
    x: Tensor,
    weight: GpuLinear,
    *,
    out: Tensor | None = None,
    deterministic: bool = False,
    workspace: LinearWorkspace | None = None,
) -> Tensor:
    """`x @ w.T + bias`; see `reference.linear`, which defines it.

    Args:
        x: [T, in], float32, float16 or bfloat16; rows may have gaps, columns may not.
        weight: dense of the type of `x`, tiled, 8 bits for 8-bit activations, or two of them.
        out: [T, out] to write into, of the type of `x`.
        deterministic: whether sums are in one order, whatever else is in the step.
        workspace: taken for packed weights; made anew when there is none.

    Returns:
        [T, out] in the type of `x`.

    Raises:
        ValueError: shapes or strides that do not fit.
    """
    out = _output(x, weight, out)
    if len(x) == 0:
        return out
    match weight:
        case TiledLinear():
            return _tiled(x, weight, out, deterministic, workspace)
        case DenseWeight():
            return _dense(x, weight, out, deterministic, workspace)
        case Int8Linear():
            plan = plan_product(weight, len(x), gpu_of(x.device), deterministic=deterministic)
            launch_w8a8(x, weight, out, plan, workspace)
            return out
        case LowRankWeight():
            inner = apply_linear(x, weight.first, deterministic=deterministic, workspace=workspace)
            return apply_linear(
                inner, weight.second, out=out, deterministic=deterministic, workspace=workspace
            )
        case _:
            assert_never(weight)


def w4a16_linear(
    x: Tensor,
    weight: TiledLinear,
    *,
    out: Tensor | None = None,
    deterministic: bool = False,
    workspace: LinearWorkspace | None = None,
) -> Tensor:
    """`apply_linear` of tiles alone, 4 or 8 bits."""
    return apply_linear(x, weight, out=out, deterministic=deterministic, workspace=workspace)


def w8a8_linear(
    x: Tensor,
    weight: Int8Linear,
    *,
    out: Tensor | None = None,
    deterministic: bool = False,
    workspace: LinearWorkspace | None = None,
) -> Tensor:
    """`apply_linear` of 8 bits with the inputs of each token rounded to int8."""
    return apply_linear(x, weight, out=out, deterministic=deterministic, workspace=workspace)


def _output(x: Tensor, weight: GpuLinear, out: Tensor | None) -> Tensor:
    if x.dim() != 2 or x.shape[1] != weight.inputs or (len(x) and x.stride(1) != 1):
        raise ValueError(f"x: {tuple(x.shape)} by {x.stride()}: must be [T, {weight.inputs}]")
    shape = (len(x), weight.outputs)
    if out is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.shape != shape or out.dtype != x.dtype or (len(x) and out.stride(1) != 1):
        raise ValueError(f"out: {tuple(out.shape)} of {out.dtype}: must be {shape} of {x.dtype}")
    return out


def _dense(
    x: Tensor,
    weight: DenseWeight,
    out: Tensor,
    deterministic: bool,
    workspace: LinearWorkspace | None,
) -> Tensor:
    """Torch's product, whose order of sums changes with T; or a kernel that has one order."""
    if not deterministic:
        if weight.bias is None:
            return torch.mm(x, weight.weight.T, out=out)
        return torch.addmm(weight.bias, x, weight.weight.T, out=out)
    plan = plan_product(weight, len(x), gpu_of(x.device), deterministic=True)
    launch_dense(x, weight, out, plan, workspace or workspace_for(plan, x.device))
    return out


def _tiled(
    x: Tensor,
    weight: TiledLinear,
    out: Tensor,
    deterministic: bool,
    workspace: LinearWorkspace | None,
) -> Tensor:
    gpu = gpu_of(x.device)
    most = launch_for("linear", "choice", gpu)["tiled_tokens"]
    if len(x) > most and not deterministic:
        size = weight.outputs * weight.inputs
        wide = None if workspace is None else workspace.wide[:size].view(weight.outputs, -1)
        torch.mm(x, dequantise(weight, x.dtype, out=wide).T, out=out)
        return out if weight.bias is None else out.add_(weight.bias)
    if not deterministic and suits_few(weight, len(x), gpu):
        launch_few(x, weight, out, gpu)
        return out
    plan = plan_product(weight, len(x), gpu, deterministic=deterministic)
    launch_tiled(x, weight, out, plan, workspace or workspace_for(plan, x.device))
    return out
