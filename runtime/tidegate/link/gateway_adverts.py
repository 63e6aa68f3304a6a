"""When a gateway says who it is: on a beat, and more often when somebody may not have heard it.

One advert can get lost, and a device that lacks it can ask nobody. So it is repeated one and three
seconds after the gateway has come (back) to the broker, and sent soon after a device has come:
what the broker kept for that one may have been lost, too.
"""

from __future__ import annotations

import math
import random

from tidegate.link.timing import Timing

REPEATS_S = (0.0, 1.0, 3.0)
"""After connecting; the later ones give or take a quarter, so that no two gateways keep step."""
GREETING_S = 1.0
"""After a device came: within half of this and this."""
GREETINGS_APART_S = 5.0
"""A fleet that comes back makes no more adverts than this."""


class AdvertTimes:
    """Times on the monotonic clock, in seconds."""

    def __init__(self, timing: Timing, rng: random.Random) -> None:
        self._timing = timing
        self._rng = rng
        self._beat_s = math.inf
        self._sooner: list[float] = []
        self._greet_at_s = -math.inf
        """No greeting before this."""

    @property
    def next_s(self) -> float:
        """When the next advert is due; never while nothing has connected yet."""
        return min([self._beat_s, *self._sooner])

    def connected(self, now_s: float) -> None:
        """Whoever listens may have missed us, and may miss the next one."""
        self._sooner = [now_s + wait_s * self._rng.uniform(0.75, 1.25) for wait_s in REPEATS_S]

    def somebody_came(self, now_s: float) -> None:
        """A device has connected to the broker."""
        at_s = max(now_s + GREETING_S * self._rng.uniform(0.5, 1.0), self._greet_at_s)
        if not any(now_s < due_s <= at_s for due_s in [self._beat_s, *self._sooner]):
            self._sooner.append(at_s)
            self._greet_at_s = at_s + GREETINGS_APART_S

    def sent(self, now_s: float) -> None:
        """One has been sent, or could not be: the beat begins anew."""
        self._sooner = [due_s for due_s in self._sooner if due_s > now_s]
        self._beat_s = now_s + self._timing.advert_every_s
