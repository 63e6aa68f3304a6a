"""Mixture of experts: routing, and the chosen experts' gated MLPs in grouped products.

`route` chooses and `moe` computes; `reference` defines both and `weights` says how a layer's
experts lie in memory.
"""

from tidegate.kernels.moe.apply import MoeWorkspace, moe, route
from tidegate.kernels.moe.weights import ExpertWeights, stack_experts

__all__ = ["ExpertWeights", "MoeWorkspace", "moe", "route", "stack_experts"]
