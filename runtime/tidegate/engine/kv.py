"""`KvCache`: who owns which part of the executor's KV memory, and what may be reused.

Two shapes behind one interface. `PagedKv` hands out blocks that requests may share; `SlotKv` hands
out whole rows. Both count in units (a block, a slot), so that the scheduler does not care. Nothing
here touches KV itself: it only keeps the books for memory that the executor allocated at start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tidegate.engine.executor import Blocks, Tokens
from tidegate.engine.spill import KvUnit


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """A prefix that is already computed: its tokens, its units, and those that are free now."""

    tokens: int = 0
    units: int = 0
    drawn: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a request's KV lives, in the executor's shape."""

    blocks: Blocks | None = None
    slot: int | None = None


Copy = tuple[int, int, int]
"""(from slot, to slot, tokens), see `ExecutorStep.copies`."""


class KvCache(Protocol):
    """The books of one executor's KV. Requests are named by the engine's key.

    A reused prefix never covers the whole prompt: its last token is always computed again, or
    there would be no logits to sample from.
    """

    @property
    def unit_tokens(self) -> int:
        """Tokens of one unit."""

    @property
    def units(self) -> int:
        """All units there are."""

    @property
    def free(self) -> int:
        """Units that nobody owns; they may still hold a reusable prefix."""

    def match(self, key: int, tokens: Tokens) -> Match:
        """The longest reusable prefix of `tokens`. Changes nothing."""

    def admit(self, key: int, tokens: Tokens, *, reuse: bool = True) -> int:
        """Give `key` its reusable prefix and return that prefix's tokens; none without `reuse`."""

    def grow(self, key: int, tokens: int) -> None:
        """Make room for `tokens` tokens of `key`; never shrinks, see `trim`.

        Raises:
            CapacityError: no unit is free; a plan that was within its room never gets here.
        """

    def trim(self, key: int, tokens: int) -> None:
        """Give back the units that `tokens` tokens of `key`, all that it computed, do not need."""

    def place(self, key: int) -> Placement:
        """Where `key` lives now."""

    def held(self, key: int) -> int:
        """Units `key` has."""

    def exclusive(self, key: int) -> int:
        """Units that become free when `key` is released."""

    def commit(self, key: int, tokens: Tokens) -> None:
        """`tokens` of `key`, all from its first on, are computed and may be reused."""

    def release(self, key: int, *, forget: bool = False) -> None:
        """Free what `key` has; unknown keys are fine. `forget`: its KV is undefined, reuse none."""

    def locate(self, tokens: Tokens, unit_tokens: int) -> tuple[KvUnit, ...]:
        """Where units lie that hold the beginning of `tokens`, computed; as many as there are.

        Args:
            tokens: from their first on; the last one is a token like the others.
            unit_tokens: tokens of a unit, for paged KV those of a block.
        """

    def take_copies(self) -> tuple[Copy, ...]:
        """The copies that admissions since the last call ask for, in order."""

    def check_integrity(self) -> None:
        """Assert every invariant of the books; for tests."""
