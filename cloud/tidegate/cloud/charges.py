"""What a call takes from its key's counts and buckets, all or nothing, and what returns of it.

A claim is the charges of one call. It is taken when the call is admitted, for the most that it may
use, and settled once when the call is over, by what it used. A claim whose process died returns
whole. Memory and Redis (`redis_ledger`) keep claims alike; the memory's is the obvious twin.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tidegate.cloud.key_rules import Unit
from tidegate.cloud.sliding import SlidingWindow


@dataclass(frozen=True, kw_only=True, slots=True)
class Charge:
    """So much from one count, bucket or sliding window."""

    meter: str
    """Its name, unique among the meters of a key."""
    kind: Literal["count", "bucket", "sliding"]
    unit: Unit
    most: int
    """What a count or a window may reach, or what a bucket holds when it is full."""
    amount: int
    rate_per_s: float = 0.0
    """What flows into a bucket."""
    lasts_s: float = 0.0
    """How long a count is worth keeping from now on; 0 for the others."""
    window_s: float = 0.0
    """How long a sliding window is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """A claim that was granted; `left` has what is left for each charge."""

    left: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Denied:
    """Nothing was taken: the charge at `index` has only `left`."""

    index: int
    left: float
    wait_s: float | None = None
    """Until there is room, where the ledger alone knows: of sliding windows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Used:
    """What a call came to in the end."""

    requests: int
    tokens: int

    def of(self, unit: Unit) -> int:
        """Its amount in `unit`."""
        return self.requests if unit == "requests" else self.tokens


class Ledger(Protocol):
    """Keeps meters and claims. Safe to share."""

    async def take(self, key: str, claim: str, charges: Sequence[Charge]) -> Taken | Denied:
        """Take every charge of a claim or none; the first that lacks room is told.

        Raises:
            UnavailableError: the ledger cannot be reached.
        """

    async def peek(self, key: str, charges: Sequence[Charge]) -> Denied | None:
        """Whether these charges would be denied now; takes nothing.

        Raises:
            UnavailableError: the ledger cannot be reached.
        """

    def settle(self, key: str, claim: str, charges: Sequence[Charge], used: Used) -> None:
        """Correct a claim by what was used; the second time does nothing. Waits for nothing."""

    async def run(self) -> None:
        """Keep the claims of this process alive; ends by cancellation."""

    async def close(self) -> None:
        """Let go of what it holds."""


@dataclass(slots=True)
class _Meter:
    level: float
    at_s: float
    until_s: float


@dataclass(slots=True)
class MemoryLedger:
    """Meters of one process. What they count durably is put into them again at the start."""

    clock: Callable[[], float]
    """Monotonic seconds."""
    _meters: dict[tuple[str, str], _Meter] = field(default_factory=dict)
    _windows: dict[tuple[str, str], SlidingWindow] = field(default_factory=dict)
    _claims: dict[tuple[str, str], float] = field(default_factory=dict)
    """When each was taken."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _swept_s: float = 0.0

    async def take(self, key: str, claim: str, charges: Sequence[Charge]) -> Taken | Denied:
        """See `Ledger.take`."""
        with self._lock:
            now_s = self.clock()
            self._sweep(now_s)
            denied = self._denied(key, charges, now_s)
            if denied is not None:
                return denied
            for charge in charges:
                if charge.kind == "sliding":
                    self._window(key, charge).add(charge.amount, now_s, now_s)
                    continue
                meter = self._meter(key, charge, now_s)
                meter.level += charge.amount if charge.kind == "count" else -charge.amount
            self._claims[key, claim] = now_s
            return Taken(left=tuple(self._left(key, charge, now_s) for charge in charges))

    async def peek(self, key: str, charges: Sequence[Charge]) -> Denied | None:
        """See `Ledger.peek`."""
        with self._lock:
            return self._denied(key, charges, self.clock())

    def settle(self, key: str, claim: str, charges: Sequence[Charge], used: Used) -> None:
        """See `Ledger.settle`."""
        with self._lock:
            taken_s = self._claims.pop((key, claim), None)
            if taken_s is None:
                return
            now_s = self.clock()
            for charge in charges:
                back = charge.amount - used.of(charge.unit)
                if charge.kind == "sliding":
                    self._window(key, charge).add(-back, taken_s, now_s)
                    continue
                meter = self._meters.get((key, charge.meter))
                if meter is None or (charge.kind == "count" and now_s >= meter.until_s):
                    continue  # its period is over
                if charge.kind == "count":
                    meter.level -= back
                else:
                    meter = self._meter(key, charge, now_s)
                    meter.level = min(charge.most, meter.level + back)

    def put(self, key: str, charge: Charge) -> None:
        """Say what a count has reached already."""
        with self._lock:
            self._meter(key, charge, self.clock()).level = charge.amount

    async def run(self) -> None:
        """See `Ledger.run`: claims die with the process."""

    async def close(self) -> None:
        """See `Ledger.close`."""

    def _denied(self, key: str, charges: Sequence[Charge], now_s: float) -> Denied | None:
        for index, charge in enumerate(charges):
            left = self._left(key, charge, now_s)
            if charge.amount > left:
                wait_s = None
                if charge.kind == "sliding":
                    lacking = charge.amount - math.floor(left)
                    wait_s = self._window(key, charge).wait_s(lacking, now_s)
                return Denied(index=index, left=left, wait_s=wait_s)
        return None

    def _left(self, key: str, charge: Charge, now_s: float) -> float:
        if charge.kind == "sliding":
            return charge.most - self._window(key, charge).used(now_s)
        level = self._meter(key, charge, now_s).level
        return level if charge.kind == "bucket" else charge.most - level

    def _window(self, key: str, charge: Charge) -> SlidingWindow:
        return self._windows.setdefault((key, charge.meter), SlidingWindow(charge.window_s))

    def _meter(self, key: str, charge: Charge, now_s: float) -> _Meter:
        """The meter of a charge, a bucket with what has flowed in since."""
        meter = self._meters.get((key, charge.meter))
        if meter is None or (charge.kind == "count" and now_s >= meter.until_s):
            full = charge.most if charge.kind == "bucket" else 0
            meter = _Meter(level=full, at_s=now_s, until_s=now_s + charge.lasts_s)
            self._meters[key, charge.meter] = meter
        elif charge.kind == "bucket" and now_s > meter.at_s:
            flowed = (now_s - meter.at_s) * charge.rate_per_s
            meter.level = min(charge.most, meter.level + flowed)
            meter.at_s = now_s
        if charge.kind == "bucket":
            # By then it is full again, as one that was never used.
            missing = max(0.0, charge.most - meter.level + charge.amount)
            meter.until_s = now_s + missing / charge.rate_per_s
        return meter

    def _sweep(self, now_s: float) -> None:
        """Forget what no longer tells anything; at most once a minute."""
        if now_s - self._swept_s < 60:
            return
        self._swept_s = now_s
        over = [name for name, meter in self._meters.items() if now_s >= meter.until_s]
        for name in over:
            del self._meters[name]
        empty = [name for name, window in self._windows.items() if not window.used(now_s)]
        for name in empty:
            del self._windows[name]
