"""Factors of a second moment of activations that may be singular.

A Gram matrix of few tokens, or of inputs that some text never uses, has no Cholesky factor; and
rounding in float32 can make small eigenvalues negative. A ridge on the diagonal mends both.
"""

from __future__ import annotations

import torch

_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Of the mean diagonal; the first that is enough."""


def cholesky(moment: torch.Tensor, least: float = _RIDGES[0]) -> torch.Tensor:
    """The lower factor [n, n], float64, of a second moment and at least a ridge of `least`.

    Args:
        moment: [n, n], symmetric.
        least: share of the mean diagonal, at most 0.01.

    Raises:
        ArithmeticError: no ridge makes it positive, as with infinite activations.
    """
    wide = moment.double()
    mean = wide.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    for ridge in _RIDGES:
        if ridge < least:
            continue
        lower: torch.Tensor
        lower, failed = torch.linalg.cholesky_ex(
            wide + torch.diag((ridge * mean).expand(len(wide)))
        )
        if not failed and lower.isfinite().all():
            return lower
    raise ArithmeticError("the inputs' second moment is not positive")
