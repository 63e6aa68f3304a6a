"""`Cut`: some rows and columns of a weight, read from a file without the rest of it.

For a device that holds a part of a model: what lies beyond its part never gets to its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from tidegate.model.packed import Linear

Span = tuple[int, int]
"""First, and last without."""

N = TypeVar("N", bound=np.generic)

_ROWS = 64
"""Read at a time where only some columns are kept: a MB or two of the widest layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """What to keep of a weight [out, in]; None for all."""

    rows: Span | None = None
    columns: Span | None = None

    def times(self, count: int) -> Cut:
        """The same of a weight whose inputs lie `count` to a column, in whole columns."""
        if self.columns is None:
            return self
        first, last = self.columns
        return Cut(rows=self.rows, columns=(first // count, -(-last // count)))


WHOLE = Cut()


@runtime_checkable
class CutWeights(Protocol):
    """`Weights` that can be read in parts."""

    def part(self, role: str, cut: Cut) -> Linear | None:
        """What `cut` keeps of a linear layer, with the whole bias unless rows are cut.

        None when the weight has to be read whole to be cut.
        """


def read_cut(read: Callable[[Span], npt.NDArray[N]], rows: int, cut: Cut) -> npt.NDArray[N]:
    """What `cut` keeps of a tensor [rows, columns, ...].

    Args:
        read: gives the rows from, up to and without.
        rows: of the whole tensor.
        cut: of the first two dimensions.
    """
    first, after = cut.rows or (0, rows)
    if cut.columns is None:
        return read((first, after))
    kept = slice(*cut.columns)
    found: npt.NDArray[N] | None = None
    for at in range(first, after, _ROWS):
        piece = read((at, min(at + _ROWS, after)))[:, kept]
        if found is None:
            shape: tuple[Any, ...] = (after - first, *piece.shape[1:])
            found = np.empty(shape, piece.dtype)
        found[at - first : at - first + len(piece)] = piece
    return read((first, after))[:, kept] if found is None else found
