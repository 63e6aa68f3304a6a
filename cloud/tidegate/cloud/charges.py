"""What a call takes from its key's counts and buckets, all or nothing, and what returns of it.

A claim is the charges of one call. It is taken when the call is admitted, for the most that it may
use, and settled once when the call is over, by what it used. A claim whose process died returns
whole. Memory and Redis (`redis_ledger`) keep claims alike; the memory's is the obvious twin.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tidegate.cloud.key_rules import Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Charge:
    """So much from one count or bucket."""

    meter: str
    """Its name, unique among the meters of a key."""
    kind: Literal["count", "bucket"]
    unit: Unit
    most: int
    """What a count may reach, or what a bucket holds when it is full."""
    amount: int
    rate_per_s: float = 0.0
    """What flows into a bucket."""
    lasts_s: float = 0.0
    """How long a count is worth keeping from now on; 0 for buckets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """A claim that was granted; `left` has what is left for each charge."""

    left: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Denied:
    """Nothing was taken: the charge at `index` has only `left`."""

    index: int
    left: float


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
    _claims: set[tuple[str, str]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _swept_s: float = 0.0

    async def take(self, key: str, claim: str, charges: Sequence[Charge]) -> Taken | Denied:
        """See `Ledger.take`."""
        with self._lock:
            now_s = self.clock()
            self._sweep(now_s)
            meters = [self._meter(key, charge, now_s) for charge in charges]
            for index, (charge, meter) in enumerate(zip(charges, meters, strict=True)):
                left = meter.level if charge.kind == "bucket" else charge.most - meter.level
                if charge.amount > left:
                    return Denied(index=index, left=left)
            for charge, meter in zip(charges, meters, strict=True):
                meter.level += charge.amount if charge.kind == "count" else -charge.amount
            self._claims.add((key, claim))
            return Taken(
                left=tuple(
                    meter.level if charge.kind == "bucket" else charge.most - meter.level
                    for charge, meter in zip(charges, meters, strict=True)
                )
            )

    def settle(self, key: str, claim: str, charges: Sequence[Charge], used: Used) -> None:
        """See `Ledger.settle`."""
        with self._lock:
            if (key, claim) not in self._claims:
                return
            self._claims.discard((key, claim))
            now_s = self.clock()
            for charge in charges:
                back = charge.amount - used.of(charge.unit)
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
