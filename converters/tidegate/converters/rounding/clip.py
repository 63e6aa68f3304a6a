"""Clip search: a group may give up its outermost values for a finer step between the others.

Out of a few shrunken spans each group takes the one with the least squared error, weighted by how
much its inputs matter. The full span is among them, so the error is never larger than without.
AWQ (arXiv 2306.00978, auto_clip) and HQQ search the same way; here it needs no data, or only the
mean square of the activations.
"""

from __future__ import annotations

import numpy as np

from tidegate.converters.rounding.grid import Grid, make_grid, round_to
from tidegate.model.packed import Array, Bits

SHRINK = (0.95, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7)
"""Shares of the span that are tried. At 7/8 a symmetric 4-bit group reaches -8 steps."""

_GAIN = np.float32(1 - 2.0**-12)
"""A smaller gain is not taken: it could be the rounding of the error itself."""


def search(
    grouped: Array,
    ends: tuple[Array, Array],
    bits: Bits,
    *,
    symmetric: bool,
    importance: Array | None,
) -> Grid:
    """The best grid of every group.

    Args:
        grouped: [rows, groups, group_size].
        ends: least and greatest value of every group, as `grid.span` gives them.
        bits: 4 or 8.
        symmetric: no zero-points.
        importance: [groups, group_size], at least 0; all inputs alike when None.
    """
    root = None if importance is None else np.sqrt(importance)
    low, high = ends
    best = make_grid(low, high, bits, symmetric=symmetric)
    least = _error(grouped, best, root)
    share = np.ones_like(low)
    for shrink in map(np.float32, SHRINK):
        tried = make_grid(low * shrink, high * shrink, bits, symmetric=symmetric)
        error = _error(grouped, tried, root)
        better = error < least * _GAIN
        share[better], least[better] = shrink, error[better]
    return make_grid(low * share, high * share, bits, symmetric=symmetric)


def _error(grouped: Array, grid: Grid, root: Array | None) -> Array:
    """Sum of squares of each group's error, every value times `root` first."""
    error = round_to(grouped, grid)
    error -= grid.centre
    error *= grid.scales[..., None]
    error -= grouped
    if root is not None:
        error *= root
    total: Array = np.einsum("rgs,rgs->rg", error, error)
    return total
