"""`SlotKv`: KV in fixed rows, one request each, reused by rewinding a row or copying its beginning.

A row remembers the tokens whose KV it holds. Rewinding costs nothing and loses what came after;
copying keeps the source and is done by the executor before the rows of the same step.
"""

from __future__ import annotations

import numpy as np

from tidegate.engine.executor import SlotGeometry, Tokens
from tidegate.engine.kv import Copy, Match, Placement
from tidegate.engine.spill import KvUnit
from tidegate.errors import CapacityError

LEAST_COPIED_TOKENS = 16
"""Shorter prefixes are computed again; a copy costs a pass over the whole row in some backends."""


class SlotKv:
    """Rows of a fixed buffer. The first `_valid[slot]` of `_content[slot]` are computed tokens."""

    def __init__(self, geometry: SlotGeometry, *, reuse: bool = True) -> None:
        self._slot_tokens = geometry.slot_tokens
        self._reuse = reuse
        self._content = np.zeros((geometry.slots, geometry.slot_tokens), dtype=np.int64)
        self._valid = [0] * geometry.slots
        self._owner: list[int | None] = [None] * geometry.slots
        self._slot_of: dict[int, int] = {}
        self._freed_at = [0] * geometry.slots
        self._clock = 0
        self._copies: list[Copy] = []

    @property
    def unit_tokens(self) -> int:
        return self._slot_tokens

    @property
    def units(self) -> int:
        return len(self._owner)

    @property
    def free(self) -> int:
        return len(self._owner) - len(self._slot_of)

    def match(self, key: int, tokens: Tokens) -> Match:
        """Tokens only: a hit still takes a slot of its own, so it brings no units."""
        return Match(tokens=self._best(tokens)[1] if self.free else 0)

    def admit(self, key: int, tokens: Tokens, *, reuse: bool = True) -> int:
        assert key not in self._slot_of, "a request is admitted once"
        if not self.free:
            raise CapacityError(f"all {self.units} KV slots are in use")
        source, common = self._best(tokens) if reuse else (0, 0)
        slot = self._destination(source, common)
        if slot != source:
            common = common if common >= LEAST_COPIED_TOKENS else 0
            if common:
                self._copies.append((source, slot, common))
                self._content[slot, :common] = tokens[:common]
        self._valid[slot] = common
        self._owner[slot] = key
        self._slot_of[key] = slot
        return common

    def grow(self, key: int, tokens: int) -> None:
        if tokens > self._slot_tokens:
            raise CapacityError(f"{tokens} tokens: a KV slot holds {self._slot_tokens}")

    def trim(self, key: int, tokens: int) -> None:
        """Nothing to give back: a slot is a whole one."""

    def place(self, key: int) -> Placement:
        return Placement(slot=self._slot_of[key])

    def held(self, key: int) -> int:
        return int(key in self._slot_of)

    def exclusive(self, key: int) -> int:
        return self.held(key)

    def commit(self, key: int, tokens: Tokens) -> None:
        slot = self._slot_of[key]
        valid = self._valid[slot]
        self._content[slot, valid : len(tokens)] = tokens[valid:]
        self._valid[slot] = len(tokens)

    def release(self, key: int, *, forget: bool = False) -> None:
        slot = self._slot_of.pop(key, None)
        if slot is None:
            return
        self._owner[slot] = None
        self._clock += 1
        self._freed_at[slot] = self._clock
        if forget:
            self._valid[slot] = 0

    def locate(self, tokens: Tokens, unit_tokens: int) -> tuple[KvUnit, ...]:
        common = [self._common(slot, tokens) for slot in range(self.units)]
        slot = max(range(self.units), key=common.__getitem__)
        starts = range(0, common[slot] - unit_tokens + 1, unit_tokens)
        return tuple(KvUnit(home=slot, first=first) for first in starts)

    def take_copies(self) -> tuple[Copy, ...]:
        copies, self._copies = tuple(self._copies), []
        return copies

    def check_integrity(self) -> None:
        owned = {key: slot for slot, key in enumerate(self._owner) if key is not None}
        assert owned == self._slot_of, "owners and slots agree"
        assert all(0 <= valid <= self._slot_tokens for valid in self._valid)

    def _best(self, tokens: Tokens) -> tuple[int, int]:
        """The slot that shares the longest beginning with `tokens`, and how long that is.

        Of equals a free slot comes first, since rewinding is cheaper than copying.
        """
        if not self._reuse:
            return 0, 0
        usable = tokens[:-1]  # the last token is always computed
        common = [self._common(slot, usable) for slot in range(self.units)]
        best = max(
            range(self.units), key=lambda slot: (common[slot], self._owner[slot] is None, -slot)
        )
        return best, common[best]

    def _common(self, slot: int, tokens: Tokens) -> int:
        most = min(self._valid[slot], len(tokens))
        differs = self._content[slot, :most] != tokens[:most]
        return int(differs.argmax()) if differs.any() else most

    def _destination(self, source: int, common: int) -> int:
        """Rewind `source` when that loses less than it keeps, otherwise take the oldest free slot.

        Slots without content come first and the lowest of them: executors prefer low rows.
        """
        if self._owner[source] is None and common and 2 * common >= self._valid[source]:
            return source
        free = [slot for slot, owner in enumerate(self._owner) if owner is None]
        return min(free, key=lambda slot: (self._valid[slot] > 0, self._freed_at[slot], slot))
