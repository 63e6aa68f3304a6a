"""Rounding with error feedback (GPTQ): later columns make up for the rounding of earlier ones.

It lowers `tr((W - Q) H (W - Q)^T)` for the Gram matrix H of a layer's inputs. With H = R R^T,
R upper triangular, and F = R diag(R)^-1, column k is rounded from

    w_k + sum over j < k of (w_j - q_j) F_jk

which is GPTQ (arXiv 2210.17323) in the form of QuIP's LDLQ (arXiv 2307.13304, theorem 6): the same
integers, but one factorisation and no inverse. Columns go by falling diagonal of H; every group's
grid is fixed beforehand, so groups stay contiguous in the input and no index is stored.

All is float32. Damping by a share d of the mean diagonal keeps H's condition below inputs / d,
a million at most, and the largest layer then takes two matrices of the size of H and no more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from tidegate.converters.rounding.grid import packed
from tidegate.model.packed import Array, Bytes, PackedLinear

_BLOCK = 128
"""Columns rounded before their errors reach the rest by one matrix product."""

_RAISES = 3
"""Times that damping is raised tenfold for a matrix that is not positive definite."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Feedback:
    """How errors of earlier columns change later ones."""

    order: torch.Tensor
    """[in]: which column is visited when."""
    matrix: torch.Tensor
    """F, upper triangular [in, in], in order of visit."""


def factorise(gram: torch.Tensor, damping: float) -> Feedback | None:
    """The feedback of a Gram matrix [in, in], or None when no damping makes it definite.

    Inputs that are always 0 come last and neither give nor take feedback: their weights are
    rounded to nearest, as good as any when nothing is known about them.
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    share = float(gram.diagonal().double().mean()) * damping
    if not np.isfinite(share):
        return None
    for _ in range(_RAISES + 1):
        # Upper triangular from the usual lower one, by taking the columns in reverse.
        backwards = order.flip(0)
        matrix = gram[backwards[:, None], backwards]
        dead = matrix.diagonal() <= 0
        matrix.diagonal().add_(share).masked_fill_(dead, 1.0)
        info = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(matrix, out=(matrix, info))
        if int(info) == 0 and bool(matrix.isfinite().all()):
            matrix = matrix.flip(0, 1)
            matrix /= matrix.diagonal().clone()
            return Feedback(order=order, matrix=matrix)
        share *= 10
    return None


def round_with_feedback(weight: torch.Tensor, start: PackedLinear, feedback: Feedback) -> Bytes:
    """The integers [out, groups, group_size] of `weight` [out, in] on the grid of `start`.

    Padding holds the zero-point.
    """
    order, top = feedback.order, float((1 << start.bits) - 1)
    # Transposed, so that what is handled together lies together.
    columns, scales, centres = (part.T[order] for part in (weight, *column_grid(start)))
    integers, errors = torch.empty_like(columns), torch.empty_like(columns)
    count = len(columns)
    for first in range(0, count, _BLOCK):
        after = min(first + _BLOCK, count)
        known = feedback.matrix[:first, first:after].T
        wanted = torch.addmm(columns[first:after], known, errors[:first])
        for k in range(first, after):
            within = errors[first:k].T
            value = torch.addmv(wanted[k - first], within, feedback.matrix[first:k, k])
            integers[k] = value.div_(scales[k]).round_().add_(centres[k]).clamp_(0, top)
            errors[k] = columns[k] - (integers[k] - centres[k]) * scales[k]
    result = torch.empty_like(integers)
    result[order] = integers
    return with_padding(result.T, start)


def column_grid(linear: PackedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero-point of every column, float32 [out, in] each."""
    zeros = linear.zeros
    centre = np.full(linear.scales.shape, linear.symmetric_zero) if zeros is None else zeros
    return _by_column(linear.scales, linear), _by_column(centre, linear)


def _by_column(part: npt.NDArray[np.generic], linear: PackedLinear) -> torch.Tensor:
    wide = np.repeat(part.astype(np.float32), linear.group_size, axis=1)
    return torch.from_numpy(wide)[:, : linear.inputs]


def with_padding(integers: torch.Tensor, start: PackedLinear) -> Bytes:
    """Integers [out, in] as [out, groups, group_size]; the padding holds the zero-point."""
    shape = (start.outputs, start.groups, start.group_size)
    zeros: Bytes | np.uint8 = (
        np.uint8(start.symmetric_zero) if start.zeros is None else start.zeros[..., None]
    )
    result = np.empty(shape, np.uint8)
    result[...] = zeros
    flat = result.reshape(start.outputs, -1)
    flat[:, : start.inputs] = integers.to(torch.uint8).numpy()
    return result


def row_errors(weight: torch.Tensor, linear: PackedLinear, gram: torch.Tensor) -> torch.Tensor:
    """`(w - q) H (w - q)^T` of every row, float32 [out]."""
    error = weight - torch.from_numpy(linear.dequantise())
    return ((error @ gram) * error).sum(dim=1)


def better_rows(
    weight: torch.Tensor, gram: torch.Tensor, one: PackedLinear, other: PackedLinear
) -> PackedLinear:
    """Each row from the one that errs less on these inputs; from `one` where they are even."""
    takes = row_errors(weight, other, gram) < row_errors(weight, one, gram)
    return pick_rows(one, other, takes)


def pick_rows(one: PackedLinear, other: PackedLinear, takes: torch.Tensor) -> PackedLinear:
    """The rows of `one`, and those of `other` where `takes` [out] says so."""
    rows = takes.numpy()
    zeros = None
    if one.zeros is not None and other.zeros is not None:
        zeros = np.where(rows[:, None], other.zeros, one.zeros)
    return replace(
        one,
        values=np.where(rows[:, None, None], other.values, one.values),
        scales=np.where(rows[:, None], other.scales, one.scales),
        zeros=zeros,
    )


def with_integers(
    linear: PackedLinear, integers: Bytes, scales: Array | None = None
) -> PackedLinear:
    """The same layer with other integers [out, groups, group_size], and perhaps other scales."""
    return replace(
        linear,
        values=packed(integers.astype(np.float32), linear.bits),
        scales=linear.scales if scales is None else scales,
    )
