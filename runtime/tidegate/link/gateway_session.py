"""One request as the gateway sees it: the mirror of `device_session`, just as sans-I/O.

    ACCEPTED -> STREAMING -> FINISHED -> CLOSED          | CANCELLED | PARKED (its lease ended)

It keeps every payload until the device has acknowledged the end, so that any attempt of the
device can be served again from any payload on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from enum import Enum, auto
from types import MappingProxyType

from tidegate.link.messages import Bundle, Control, Status, bundle_from
from tidegate.link.timing import Timing


class State(Enum):
    """Where a request is."""

    ACCEPTED = auto()
    STREAMING = auto()
    FINISHED = auto()
    CLOSED = auto()
    CANCELLED = auto()
    PARKED = auto()


class Event(Enum):
    """What can happen to it."""

    PRODUCE = auto()
    FINISH = auto()
    DONE = auto()
    CANCEL = auto()
    LEASE_END = auto()


TERMINAL = frozenset((State.CLOSED, State.CANCELLED, State.PARKED))
_ENDS = {
    Event.DONE: State.CLOSED,
    Event.CANCEL: State.CANCELLED,
    Event.LEASE_END: State.PARKED,
}
_RUNS = {Event.PRODUCE: State.STREAMING, Event.FINISH: State.FINISHED, **_ENDS}
TRANSITIONS: Mapping[State, Mapping[Event, State]] = MappingProxyType(
    {
        State.ACCEPTED: _RUNS,
        State.STREAMING: _RUNS,
        State.FINISHED: _ENDS,
    }
)


class GatewaySession:
    """State of one live request.

    `payloads` starts with what an earlier life stored; the handler's first outputs are then
    skipped, because it is deterministic and repeats them.
    """

    def __init__(self, *, timing: Timing, now_s: float, stored: list[bytes]) -> None:
        self.state = State.ACCEPTED
        self.payloads = stored
        self._timing = timing
        self._repeated = len(stored)
        self._ending: tuple[Status, str] | None = None
        self._peak = len(stored)
        self.on_request(now_s, have=0, credit=timing.credit, ttl_s=math.inf)

    def produce(self, payload: bytes) -> int | None:
        """The handler yielded `payload`; returns its index, or None when it is a repetition."""
        if self._repeated:
            self._repeated -= 1
            return None
        self._go(Event.PRODUCE)
        self.payloads.append(payload)
        return len(self.payloads) - 1

    def finish(self, status: Status, code: str) -> None:
        """The handler ended, or a stored answer is complete."""
        self._go(Event.FINISH)
        self._ending = (status, code)

    def on_request(self, now_s: float, *, have: int, credit: int, ttl_s: float) -> None:
        """The device asked (again) under a new attempt: new keys, from `have` on."""
        self._acked = have
        self._sent = have
        self._credit = min(credit, self._timing.credit)
        self._in_flight: deque[tuple[int, int]] = deque()
        self._number = 0
        self._rewind_number = -1
        self._final_sent = False
        self._life_at_s = now_s
        self._lease_until_s = now_s + self._timing.lease_s
        self._expires_s = now_s + ttl_s

    def on_ack(self, now_s: float, control: Control) -> bool:
        """Acknowledgement; returns True when it sent the stream back."""
        self._lease_until_s = now_s + self._timing.lease_s
        self._credit = min(control.credit, self._timing.credit)
        self._acked = max(self._acked, min(control.have, len(self.payloads)))
        while self._in_flight and self._in_flight[0][1] <= self._acked:
            self._in_flight.popleft()
        # Only askings that have seen a chunk sent after the last rewind count: others crossed it.
        if not control.rewind or control.seen <= self._rewind_number:
            return False
        self._sent = self._acked
        self._in_flight.clear()
        self._rewind_number = self._number
        self._final_sent = False
        return True

    def on_done(self) -> None:
        """The device has stored the whole answer."""
        self._go(Event.DONE)

    def cancel(self) -> None:
        self._go(Event.CANCEL)

    def poll(self, now_s: float) -> list[Bundle]:
        """Bundles to seal and publish now, in order: they are the attempt's next chunks."""
        if self.state in TERMINAL:
            return []
        if now_s >= min(self._lease_until_s, self._expires_s):
            self._go(Event.LEASE_END)
            return []
        bundles = []
        while (bundle := self._next_bundle()) is not None:
            bundles.append(bundle)
        if not bundles and now_s >= self._life_at_s:
            bundles.append(self._sign_of_life())
        if bundles:
            self._life_at_s = now_s + self._timing.heartbeat_s
        return bundles

    def next_wakeup_s(self) -> float:
        """When `poll` next has something to do if nothing else happens."""
        return min(self._life_at_s, self._lease_until_s, self._expires_s)

    def take_released(self) -> int:
        """Payloads sent for the first time since the last call: room for the handler."""
        reached = min(self._sent, len(self.payloads))
        released = max(0, reached - self._peak)
        self._peak += released
        return released

    def _next_bundle(self) -> Bundle | None:
        """The next chunk that is worth a place in the window."""
        waiting = self._sent < len(self.payloads)
        if len(self._in_flight) >= self._credit or not (waiting or self._final_due()):
            return None
        return self._sent_as(bundle_from(self.payloads, self._sent))

    def _final_due(self) -> bool:
        return self._ending is not None and not self._final_sent

    def _sign_of_life(self) -> Bundle:
        """Nothing new: say how far the stream is, which also shows a lost tail."""
        return self._sent_as(())

    def _sent_as(self, payloads: tuple[bytes, ...]) -> Bundle:
        first = self._sent
        end = first + len(payloads)
        status, code = Status.MORE, ""
        if self._ending is not None and end >= len(self.payloads):
            status, code = self._ending
            self._final_sent = True
            if not payloads:
                # A device that claims more payloads than there are must notice: see `Bundle.end`.
                first = end = len(self.payloads)
        if payloads:
            self._in_flight.append((self._number, end))
        self._sent = max(self._sent, end)
        self._number += 1
        return Bundle(first=first, payloads=payloads, status=status, code=code)

    def _go(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state][event]
