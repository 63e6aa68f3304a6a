"""Which shape a step is padded to. Pure.

A step in which every row decodes one token is padded to one of a few shapes, each of which is
recorded once. All others run as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tidegate.cloud.step_buffers import StepShape
from tidegate.engine.executor import Row

_DENSE_ROWS: Final = 8
"""Up to here rows are rounded up to powers of two, then to multiples of it, of 32 beyond 64: at
most a third of a step is padding, and most of a step's time is its weights, not its rows."""
_SHORTEST_LENGTH: Final = 512
"""Lengths are rounded up to this times a power of four: they size grids, and a program that finds
nothing to do ends at once."""


class DecodeShapes:
    """The shapes of decode steps of one executor."""

    def __init__(self, *, rows: int, context_tokens: int, block_tokens: int) -> None:
        """Make the list for steps of up to `rows` requests."""
        self._rows, self._context_tokens, self._block_tokens = rows, context_tokens, block_tokens

    def of(self, rows: Sequence[Row]) -> StepShape | None:
        """The shape that these rows are padded to; None unless every one decodes one token."""
        if not rows or any(len(row.tokens) != 1 or row.logits != 1 for row in rows):
            return None
        count = padded_rows(len(rows), self._rows)
        length = padded_length(max(row.past for row in rows) + 1, self._context_tokens)
        return StepShape(
            rows=count,
            tokens=count,
            width=-(-length // self._block_tokens),
            logits=count,
            most_tokens=1,
            most_length=length,
        )


def exact_shape(rows: Sequence[Row], block_tokens: int) -> StepShape:
    """The shape of rows as they are, with a logit at least, since nothing can be asked of none."""
    length = max(row.past + len(row.tokens) for row in rows)
    return StepShape(
        rows=len(rows),
        tokens=sum(len(row.tokens) for row in rows),
        width=-(-length // block_tokens),
        logits=max(1, sum(row.logits for row in rows)),
        most_tokens=max(len(row.tokens) for row in rows),
        most_length=length,
    )


def padded_rows(rows: int, most: int) -> int:
    """Rows that a decode step of `rows` is padded to."""
    size = 1
    while size < rows:
        size = size * 2 if size < _DENSE_ROWS else size + (_DENSE_ROWS if size < 64 else 32)
    return min(size, most)


def padded_length(tokens: int, context_tokens: int) -> int:
    """The length that the longest request of a decode step is rounded up to."""
    length = _SHORTEST_LENGTH
    while length < tokens:
        length *= 4
    return min(length, context_tokens)
