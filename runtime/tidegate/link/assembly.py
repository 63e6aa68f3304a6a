"""Requests of several chunks until they are whole: a bounded table, without a clock of its own.

Only what has opened gets a place, and the room for its whole signed length is taken at once, so
neither strangers nor many large requests can make a gateway hold more than its bounds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from tidegate.errors import SealError
from tidegate.link.envelope import MessageType, RequestId, route
from tidegate.link.opening import PartialRequest

MAX_HELD_BYTES = 64 * 1024 * 1024
"""Bodies of all requests that are not whole yet."""
MAX_HELD_PER_DEVICE = 4
HELD_FOR_S = 120.0
"""From the first chunk on: 1 MiB over a line of 100 kbit/s takes 84 s."""


@dataclass(frozen=True, slots=True)
class _Place:
    handle: str
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class _Held:
    partial: PartialRequest
    until_s: float


class Assembler:
    """All requests of one gateway of which chunks are missing."""

    def __init__(self, open_first: Callable[[str, bytes], PartialRequest]) -> None:
        self._open_first = open_first
        self._held: OrderedDict[_Place, _Held] = OrderedDict()
        self._held_bytes = 0

    def receive(self, now_s: float, handle: str, message: bytes) -> PartialRequest | None:
        """A REQUEST or PART came on the topic of `handle`; returns what it made complete.

        A chunk that is known already, or of an older attempt, changes nothing.

        Raises:
            SealError: it does not open, belongs to nothing here, or there is no room for it.
        """
        self.expire(now_s)
        where = route(message)
        place = _Place(handle, where.request_id)
        if where.kind is MessageType.REQUEST:
            partial = self._open_first(handle, message)
            if partial.complete:
                return partial
            self._hold(now_s, place, partial)
            return None
        held = self._held.get(place)
        if held is None:
            raise SealError
        held.partial.take(message)
        if not held.partial.complete:
            return None
        self._drop(place)
        return held.partial

    def expire(self, now_s: float) -> None:
        """Forget what was not completed in time."""
        while self._held:
            place, held = next(iter(self._held.items()))
            if now_s < held.until_s:
                return
            self._drop(place)

    @property
    def held_bytes(self) -> int:
        """Room taken, which is the sum of the lengths that were announced."""
        return self._held_bytes

    def _hold(self, now_s: float, place: _Place, partial: PartialRequest) -> None:
        before = self._held.get(place)
        if before is not None:
            if partial.attempt <= before.partial.attempt:
                return
            self._drop(place)
        its_own = sum(held.handle == place.handle for held in self._held)
        if its_own >= MAX_HELD_PER_DEVICE or self._held_bytes + partial.body_bytes > MAX_HELD_BYTES:
            raise SealError
        self._held[place] = _Held(partial, now_s + HELD_FOR_S)
        self._held_bytes += partial.body_bytes

    def _drop(self, place: _Place) -> None:
        self._held_bytes -= self._held.pop(place).partial.body_bytes
