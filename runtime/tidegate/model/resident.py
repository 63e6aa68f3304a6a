"""`ResidentWeights`: reads every weight once and keeps it, for backends that run the walk itself.

A lowering that emits a graph lets each layer go; one that executes asks for the same weights every
step and recognises them by identity.
"""

from __future__ import annotations

from tidegate.model.packed import Array, Linear
from tidegate.model.walk import Weights


class ResidentWeights:
    """`Weights` that gives the same object for the same role, read from `source` on first use."""

    def __init__(self, source: Weights) -> None:
        """Keep what `source` gives; it may be closed once every role was read."""
        self._source = source
        self._linears: dict[str, Linear] = {}
        self._vectors: dict[str, Array] = {}

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        if role not in self._linears:
            self._linears[role] = self._source.linear(role)
        return self._linears[role]

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        if role not in self._vectors:
            self._vectors[role] = self._source.vector(role)
        return self._vectors[role]

    def clear(self) -> None:
        """Let everything go; nothing can be asked for any more."""
        self._linears.clear()
        self._vectors.clear()
