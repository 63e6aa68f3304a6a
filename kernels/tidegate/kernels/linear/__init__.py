"""Linear layers: dense, 4- or 8-bit weights with 16-bit activations, and 8 bits with 8.

`apply_linear` multiplies and `reference` defines it; `weights` says how weights lie in memory and
`retile` brings them there.
"""

from tidegate.kernels.linear.apply import apply_linear, w4a16_linear, w8a8_linear
from tidegate.kernels.linear.dequantise import dequantise
from tidegate.kernels.linear.int8 import Int8Linear, int8_linear
from tidegate.kernels.linear.retile import can_merge, retile, to_gpu
from tidegate.kernels.linear.rows import tiled_rows
from tidegate.kernels.linear.weights import DenseWeight, GpuLinear, LowRankWeight, TiledLinear
from tidegate.kernels.linear.workspace import LinearWorkspace

__all__ = [
    "DenseWeight",
    "GpuLinear",
    "Int8Linear",
    "LinearWorkspace",
    "LowRankWeight",
    "TiledLinear",
    "apply_linear",
    "can_merge",
    "dequantise",
    "int8_linear",
    "retile",
    "tiled_rows",
    "to_gpu",
    "w4a16_linear",
    "w8a8_linear",
]
