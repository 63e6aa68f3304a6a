"""Launches of the product kernels, as a plan says; whoever calls has checked the shapes."""

from __future__ import annotations

import torch

from tidegate.kernels.linear.plan import DENSE_STEP, ProductPlan
from tidegate.kernels.linear.products import dense_kernel, tiled_kernel
from tidegate.kernels.linear.weights import DenseWeight, TiledLinear
from tidegate.kernels.linear.workspace import LinearWorkspace

Tensor = torch.Tensor


def launch_tiled(
    x: Tensor, weight: TiledLinear, out: Tensor, plan: ProductPlan, workspace: LinearWorkspace
) -> None:
    """Multiply [T, in] by tiles into `out` [T, out]."""
    workspace.check(plan)
    tiled_kernel[plan.grid](
        x,
        weight.values,
        weight.scales,
        weight.zeros,
        weight.bias,
        out,
        workspace.partial,
        workspace.arrived,
        len(x),
        weight.inputs,
        weight.outputs,
        weight.steps,
        x.stride(0),
        out.stride(0),
        TILES=plan.block_tiles,
        TOKENS=plan.block_tokens,
        STEP=weight.step,
        BITS=weight.bits,
        SYMMETRIC=weight.zeros is None,
        HAS_BIAS=weight.bias is not None,
        EVEN=weight.steps * weight.step == weight.inputs,
        SPLITS=plan.splits,
        APART=plan.apart,
        STAGES=plan.num_stages,
        num_warps=plan.num_warps,
    )


def launch_dense(
    x: Tensor, weight: DenseWeight, out: Tensor, plan: ProductPlan, workspace: LinearWorkspace
) -> None:
    """Multiply [T, in] by a dense weight into `out` [T, out]."""
    workspace.check(plan)
    dense_kernel[plan.grid](
        x,
        weight.weight,
        weight.bias,
        out,
        workspace.partial,
        workspace.arrived,
        len(x),
        weight.inputs,
        weight.outputs,
        x.stride(0),
        weight.weight.stride(0),
        out.stride(0),
        TILES=plan.block_tiles,
        TOKENS=plan.block_tokens,
        STEP=DENSE_STEP,
        HAS_BIAS=weight.bias is not None,
        SPLITS=plan.splits,
        APART=plan.apart,
        STAGES=plan.num_stages,
        num_warps=plan.num_warps,
    )
