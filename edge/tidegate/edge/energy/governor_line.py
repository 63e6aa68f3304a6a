"""`Line`: those who wait for their place, until it is said or for as long as they may be held.

The bounds hold whatever is decided: a request that nobody places goes to the router's clock.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from tidegate.edge.energy.governor_device import Device
from tidegate.edge.energy.governor_requests import Ask, Requests

_log = logging.getLogger(__name__)

_OVERDUE: Final = 10
"""Times that a request which finds no free row may be held for as long as one that does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a request goes now, and why with the numbers."""

    place: Literal["edge", "cloud"]
    reason: str


class Line:
    """Of one governor. On the event loop."""

    def __init__(
        self, requests: Requests, device: Device, *, longest_hold_s: float, most_hold_s: float
    ) -> None:
        """Nobody waits yet.

        Args:
            requests: where those who wait are held.
            device: whose rows they wait for.
            longest_hold_s: that background work may be held for outside quiet hours.
            most_hold_s: see `Governor`.
        """
        self._requests, self._device = requests, device
        self._longest_hold_s, self._most_hold_s = longest_hold_s, most_hold_s
        self._placing: dict[str, asyncio.Future[Placement | None]] = {}
        self._told_held: set[str] = set()

    def enter(self, ask: Ask, now_s: float) -> None:
        """A request waits from now on; `placed` is to be awaited next, `left` called after it."""
        self._requests.hold(ask, now_s)
        self._placing[ask.id] = asyncio.get_running_loop().create_future()

    def left(self, request_id: str) -> None:
        """It waits no longer, however that came."""
        self._placing.pop(request_id, None)
        self._told_held.discard(request_id)

    async def placed(self, ask: Ask) -> Placement | None:
        """Its place; None: the clock is to decide."""
        placing = self._placing[ask.id]
        in_time = self._background if ask.may_wait else self._foreground
        if await in_time(placing):
            return placing.result()
        _log.warning("energy: request %s was held for too long: it is placed by time", ask.id)
        self._requests.leave(ask.id)
        return None

    def say(self, request_id: str, placement: Placement) -> None:
        """Tell who waits; the log has the reason once."""
        _log.info("energy: request %s: %s", request_id, placement.reason)
        placing = self._placing.get(request_id)
        if placing is not None and not placing.done():
            placing.set_result(placement)

    def newly_held(self) -> Iterator[str]:
        """Each that waits, once."""
        for request_id in self._requests.held:
            if request_id not in self._told_held:
                self._told_held.add(request_id)
                yield request_id

    def give_back(self, *, background: bool) -> None:
        """Those who wait go to the router's clock: who may not wait first, the others if wanted."""
        held = list(self._requests.held.values())
        for one in sorted(held, key=lambda one: one.ask.may_wait):
            if one.ask.may_wait and not background:
                continue
            self._requests.leave(one.ask.id)
            placing = self._placing.get(one.ask.id)
            if placing is not None and not placing.done():
                placing.set_result(None)

    async def _foreground(self, placing: asyncio.Future[Placement | None]) -> bool:
        for _ in range(_OVERDUE):
            if (await asyncio.wait({placing}, timeout=self._most_hold_s))[0]:
                return True
            if len(self._requests.begun) < self._device.costs.costs.rows:
                return False
        return False

    async def _background(self, placing: asyncio.Future[Placement | None]) -> bool:
        """Quiet hours are looked up again at each bound: they may begin while work is held."""
        clock, budget = self._device.clock, self._device.budget
        longest_s = clock() + self._longest_hold_s
        while True:
            now_s = clock()
            rest_s = max(longest_s, budget.quiet_until_s(now_s)) + self._most_hold_s - now_s
            if rest_s <= 0:
                return False
            if (await asyncio.wait({placing}, timeout=rest_s))[0]:
                return True
