"""A window that slides over amounts, in slots of a 128th of its length: never too much, cheaply.

What is taken counts until its whole slot has left the window, so no stretch of the window's length
ever gets more than the amount; the price is that up to a 128th of the window passes before it is
free again, and the gain that 129 numbers are all there is to keep, however many calls there are.
What returns goes to the slot it was taken in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

SLOTS: Final = 128
"""0.8 % of the window: below the 2 % that limits are held to (benchmarks/cloud/limits.py)."""


def slot_at(at_s: float, window_s: float) -> int:
    """The number of the slot that a time lies in."""
    return math.floor(at_s * SLOTS / window_s)


@dataclass(slots=True)
class SlidingWindow:
    """See the module. Times are of one clock that only goes forward."""

    window_s: float
    _amounts: dict[int, int] = field(default_factory=dict)
    """By slot."""

    def used(self, now_s: float) -> int:
        """What counts now."""
        oldest = slot_at(now_s, self.window_s) - SLOTS
        for slot in [slot for slot in self._amounts if slot < oldest]:
            del self._amounts[slot]
        return sum(self._amounts.values())

    def add(self, amount: int, at_s: float, now_s: float) -> None:
        """Count `amount`, or take it back, where it was taken; nothing if that has passed."""
        slot = slot_at(at_s, self.window_s)
        if slot >= slot_at(now_s, self.window_s) - SLOTS:
            self._amounts[slot] = self._amounts.get(slot, 0) + amount

    def wait_s(self, amount: int, now_s: float) -> float:
        """How long until so much has left it, if nothing is taken or returned meanwhile."""
        for slot in sorted(self._amounts):
            amount -= self._amounts[slot]
            if amount <= 0:
                return max(0.0, (slot + 1 + SLOTS) * self.window_s / SLOTS - now_s)
        return self.window_s
