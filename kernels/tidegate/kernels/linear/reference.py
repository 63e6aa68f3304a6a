"""What the linear kernels compute, in plain torch: weights widened to float32, one product.

Eight-bit activations are rounded as the kernel rounds them, half to even, so on these the two
differ only by the order of float32 sums.
"""

from __future__ import annotations

from typing import assert_never

import torch

from tidegate.kernels.linear.int8 import Int8Linear, int8_matrix, reference_w8a8
from tidegate.kernels.linear.retile import untile
from tidegate.kernels.linear.weights import DenseWeight, GpuLinear, LowRankWeight, TiledLinear

Tensor = torch.Tensor


def weight_matrix(weight: GpuLinear) -> Tensor:
    """The weight that a layer stands for, float32 [out, in]."""
    match weight:
        case DenseWeight():
            return weight.weight.float()
        case TiledLinear():
            return untile(weight)
        case Int8Linear():
            return int8_matrix(weight)
        case LowRankWeight():
            return weight_matrix(weight.second) @ weight_matrix(weight.first)
        case _:
            assert_never(weight)


def linear(x: Tensor, weight: GpuLinear, *, out: Tensor | None = None) -> Tensor:
    """`x @ w.T + bias`, in float32; what lies between two factors is rounded to the type of `x`.

    Args:
        x: [T, in].
        weight: the layer.
        out: [T, out], to write into.

    Returns:
        [T, out] in the type of `x`.
    """
    match weight:
        case LowRankWeight():
            whole = linear(linear(x, weight.first), weight.second)
        case Int8Linear():
            whole = reference_w8a8(x, weight)
        case _:
            product = x.float() @ weight_matrix(weight).T
            bias = weight.bias
            whole = (product if bias is None else product + bias.float()).to(x.dtype)
    return whole if out is None else out.copy_(whole)
