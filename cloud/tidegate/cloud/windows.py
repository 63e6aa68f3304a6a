"""Fixed and sliding windows, by the `limits` library, in memory or on Redis.

What its strategies guarantee, and what is done about it here:

* A fixed window counts what it refuses: one call too large for what is left would close the window
  for all others. So a refused amount is taken out again. Here it stands on the library's storage
  itself, which can keep a window for longer than it lasts.
* Its window begins with the first hit and its name has no time in it, so something given back late
  would open the next window with a credit. Here the name has the window's number: windows are those
  of the clock (minute 12:34 of every replica is the same one), and late returns go nowhere.
* Around a boundary two windows' amounts may pass at once; that is what a fixed window is.
* A sliding window (`limits` calls it moving) never lets more than its amount pass in any stretch
  of its length, by the clocks of the services that share it. It keeps an entry for each unit and
  takes none back: for requests only, and taken last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from limits.errors import StorageError
from redis.asyncio import ConnectionPool

from tidegate.cloud.key_rules import Rate
from tidegate.errors import UnavailableError

_LATE_S = 60
"""A window is kept so much longer than it lasts: a hit that reached Redis after its window, from a
service that was held up, would begin it anew and pass (64 instead of 60 in one of 13 windows on a
busy machine, benchmarks/cloud/limits.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowState:
    """One window after it was asked."""

    granted: bool
    left: int
    reset_s: float
    """Until there is more room: the window's end, or when its oldest entry leaves it."""
    number: int = 0
    """Of a fixed window, to give back to the very same."""


class Windows:
    """See the module. `url` is Redis's; None keeps windows in memory."""

    def __init__(self, url: str | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._storage: Any
        self._pool: Any = None
        if url is None:
            self._storage = MemoryStorage(wrap_exceptions=True)
        else:
            # Ours, because the storage closes none.
            self._pool = ConnectionPool.from_url(
                url, socket_timeout=5.0, socket_connect_timeout=5.0
            )
            self._storage = RedisStorage(
                f"async+{url}",
                wrap_exceptions=True,
                implementation="redispy",
                key_prefix="tidegate-windows",
                connection_pool=self._pool,
            )
        self._moving = MovingWindowRateLimiter(self._storage)

    async def take(self, key: str, rate: Rate, amount: int) -> WindowState:
        """Take `amount`, or nothing.

        Raises:
            UnavailableError: Redis cannot be used.
        """
        try:
            if rate.strategy == "sliding":
                return await self._slide(key, rate, amount)
            return await self._count(key, rate, amount)
        except StorageError as error:
            raise _unavailable(error) from None

    async def peek(self, key: str, rate: Rate, amount: int) -> WindowState:
        """What `take` would say now; takes nothing.

        Raises:
            UnavailableError: Redis cannot be used.
        """
        try:
            if rate.strategy == "sliding":
                left, reset_s = await self._stats(key, rate)
                return WindowState(granted=amount <= left, left=left, reset_s=reset_s)
            number, reset_s = self._present(rate)
            name = _item(rate).key_for(key, rate.unit, str(number))
            left = max(0, rate.amount - int(await self._storage.get(name)))
            return WindowState(granted=amount <= left, left=left, reset_s=reset_s, number=number)
        except StorageError as error:
            raise _unavailable(error) from None

    async def give_back(self, key: str, rate: Rate, amount: int, number: int) -> None:
        """Return a part of what was taken from a fixed window; a sliding one keeps it.

        Raises:
            UnavailableError: Redis cannot be used.
        """
        if rate.strategy == "fixed" and amount:
            await self._add(key, rate, -amount, number)

    async def close(self) -> None:
        """Hang up."""
        if self._pool is not None:
            await self._pool.aclose()

    async def _count(self, key: str, rate: Rate, amount: int) -> WindowState:
        number, reset_s = self._present(rate)
        count = await self._add(key, rate, amount, number)
        granted = count <= rate.amount
        if not granted:
            count = await self._add(key, rate, -amount, number)
        left = max(0, rate.amount - count)
        return WindowState(granted=granted, left=left, reset_s=reset_s, number=number)

    def _present(self, rate: Rate) -> tuple[int, float]:
        """The number of the fixed window that it is now, and how long it lasts."""
        now_s = self._clock()
        number = int(now_s // rate.window_s)
        return number, (number + 1) * rate.window_s - now_s

    async def _slide(self, key: str, rate: Rate, amount: int) -> WindowState:
        granted = bool(await self._moving.hit(_item(rate), key, rate.unit, cost=amount))
        left, reset_s = await self._stats(key, rate)
        return WindowState(granted=granted, left=left, reset_s=reset_s)

    async def _stats(self, key: str, rate: Rate) -> tuple[int, float]:
        stats = await self._moving.get_window_stats(_item(rate), key, rate.unit)
        # `limits` times sliding windows by the system's clock, whatever ours is.
        reset_s = min(float(rate.window_s), max(0.0, float(stats.reset_time) - time.time()))
        return int(stats.remaining), reset_s

    async def _add(self, key: str, rate: Rate, amount: int, number: int) -> int:
        """What the window has after it; what comes late still finds it, and not a new one."""
        name = _item(rate).key_for(key, rate.unit, str(number))
        try:
            return int(await self._storage.incr(name, rate.window_s + _LATE_S, amount))
        except StorageError as error:
            raise _unavailable(error) from None


def _item(rate: Rate) -> RateLimitItem:
    return RateLimitItemPerSecond(rate.amount, rate.window_s, "tidegate")


def _unavailable(error: Exception) -> UnavailableError:
    kind = type(getattr(error, "storage_error", error)).__name__
    return UnavailableError(f"limits: their Redis cannot be used ({kind})")
