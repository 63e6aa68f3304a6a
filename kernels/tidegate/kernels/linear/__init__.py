"""Linear layers: dense, and 4- or 8-bit weights with 16-bit activations.

`apply_linear` multiplies and `reference` defines it; `weights` says how weights lie in memory and
`retile` brings them there.
"""

from tidegate.kernels.linear.apply import apply_linear, w4a16_linear
from tidegate.kernels.linear.dequantise import dequantise
from tidegate.kernels.linear.retile import can_merge, retile, to_gpu
from tidegate.kernels.linear.weights import DenseWeight, GpuLinear, LowRankWeight, TiledLinear
from tidegate.kernels.linear.workspace import LinearWorkspace

__all__ = [
    "DenseWeight",
    "GpuLinear",
    "LinearWorkspace",
    "LowRankWeight",
    "TiledLinear",
    "apply_linear",
    "can_merge",
    "dequantise",
    "retile",
    "to_gpu",
    "w4a16_linear",
]
