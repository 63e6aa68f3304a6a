"""When a gateway's chunks leave, and how large they are, so that neither tells about the text.

    off       as soon as there is something
    tick      on the next beat after there was something; sizes are multiples of 64 bytes
    constant  one chunk of one size on every beat while the answer runs, fillers included

Beats are the multiples of `Timing.tick_s` on the monotonic clock, the same for every request. In
constant mode an answer of B bytes, counting 4 for each payload, needs at most 2 B / U + 2 beats,
with U the `usable_bytes` of a chunk: payloads are never cut, but no two chunks that follow each
other would have fitted into one. One that is larger than U travels alone in a chunk that is a
multiple of the usual one.
"""

from __future__ import annotations

import math

from tidegate.link.chunks import LENGTH_BYTES
from tidegate.link.messages import BUNDLE_OVERHEAD_BYTES, MAX_BUNDLE_BYTES
from tidegate.link.timing import Timing

_ROUNDING = 1e-6
"""Of a beat: what floating point may lose."""


def next_beat_s(now_s: float, timing: Timing) -> float:
    """The first beat after `now_s`."""
    return (math.floor(now_s / timing.tick_s + _ROUNDING) + 1) * timing.tick_s


def usable_bytes(timing: Timing) -> int:
    """Payload bytes, 4 more for each, that one chunk may carry."""
    if not timing.is_constant:
        return MAX_BUNDLE_BYTES
    return timing.chunk_bytes - LENGTH_BYTES - BUNDLE_OVERHEAD_BYTES


def at_least_bytes(data_bytes: int, timing: Timing) -> int:
    """What to pad a chunk of `data_bytes` to, beyond its usual multiple of 64."""
    if not timing.is_constant:
        return 0
    return -(-(LENGTH_BYTES + data_bytes) // timing.chunk_bytes) * timing.chunk_bytes


class Beat:
    """When one request's next chunk may leave."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self.at_s: float | None = None

    def due(self, now_s: float) -> bool:
        """Whether something that waits may leave now; if not, it may at `at_s`."""
        if not self._timing.is_paced:
            self.rest()
            return True
        if self.at_s is None:
            self.at_s = next_beat_s(now_s, self._timing)
        if now_s < self.at_s:
            return False
        self.rest()
        return True

    def wait(self, now_s: float) -> None:
        """More could have left, but for want of room: try again on the next beat, or at once."""
        self.at_s = next_beat_s(now_s, self._timing) if self._timing.is_paced else now_s

    def rest(self) -> None:
        """Nothing waits any more."""
        self.at_s = None
