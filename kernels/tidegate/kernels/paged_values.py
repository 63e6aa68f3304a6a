"""What `PagedOps` passes along the walk: tensors, and sums, norms and clips not computed yet.

The walk says what is to be computed and not when, so a sum that a norm follows becomes one kernel,
and the norms of query and key end in the one that writes the cache. A value is computed at most
once, by whoever needs its numbers first. A sum takes the place of its first term, the residual
stream, which nobody can read any more: a walk that would is told so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tidegate.model.packed import Array

Tensor = torch.Tensor


@dataclass(eq=False, slots=True)
class Done:
    """Numbers, [T, width]; None once a sum or a factor took their place."""

    tensor: Tensor | None


@dataclass(eq=False, slots=True)
class Sum:
    """`x + y`: the residual stream `x` and what a part of the model adds to it."""

    x: Value
    y: Value
    tensor: Tensor | None = None


@dataclass(eq=False, slots=True)
class Norm:
    """The RMS norm of `x`, over runs as long as `weight`."""

    x: Value
    weight: Array
    eps: float
    tensor: Tensor | None = None


@dataclass(eq=False, slots=True)
class Clip:
    """`x` cut to [-limit, limit]."""

    x: Value
    limit: float
    tensor: Tensor | None = None


Value = Done | Sum | Norm | Clip
