"""Mixture of experts: routing, and the chosen experts' gated MLPs in grouped products.

`reference` defines both; `weights` says how a layer's experts lie in memory.
"""

from tidegate.kernels.moe.weights import ExpertWeights, stack_experts

__all__ = ["ExpertWeights", "stack_experts"]
