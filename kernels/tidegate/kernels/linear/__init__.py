"""Linear layers: dense, and 4- or 8-bit weights with 16-bit activations.

`reference` defines them; `weights` says how they lie in memory and `retile` brings them there.
"""

from tidegate.kernels.linear.retile import can_merge, retile, to_gpu
from tidegate.kernels.linear.weights import DenseWeight, GpuLinear, LowRankWeight, TiledLinear

__all__ = [
    "DenseWeight",
    "GpuLinear",
    "LowRankWeight",
    "TiledLinear",
    "can_merge",
    "retile",
    "to_gpu",
]
