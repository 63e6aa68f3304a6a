"""What a gateway's requests have to say, sealed as far as there is room for it to leave.

A turn costs what there is to do, not what lives: requests that something has happened to are due,
and the others are looked at when the first of them said it would have something. What finds no
room is not sealed: it waits in its session, where more may join it in one message.
"""

from __future__ import annotations

import math

from tidegate.link.counters import Tally
from tidegate.link.effects import GatewayEffect, Publish, Release
from tidegate.link.envelope import GatewayAttempt
from tidegate.link.gateway_live import Live, LiveKey, LiveTable
from tidegate.link.gateway_pacing import at_least_bytes
from tidegate.link.gateway_states import TERMINAL, State
from tidegate.link.messages import Bundle, Status
from tidegate.link.timing import Timing
from tidegate.link.topics import Topics

_LOOK_EVERY_S = 1.0
"""While nothing can leave: leases end all the same."""


class Speaker:
    """Asks the sessions of a `LiveTable` what they have to say, and seals it."""

    def __init__(self, live: LiveTable, *, topics: Topics, timing: Timing, tally: Tally) -> None:
        self._live = live
        self._topics = topics
        self._timing = timing
        self._tally = tally
        self._due: dict[LiveKey, None] = {}
        """The one that has waited longest first."""
        self._look_at_s = math.inf
        """No request that is not due has anything to say before this."""
        self._blocked = False

    def touch(self, key: LiveKey) -> None:
        """Something has happened to the request: it may have something to say."""
        self._due[key] = None

    def look(self, now_s: float) -> None:
        """Make due whatever time has made due."""
        if now_s >= self._look_at_s:
            for key, _ in self._live:
                self._due[key] = None
            self._look_at_s = math.inf

    def say(self, now_s: float, room_bytes: float) -> list[GatewayEffect]:
        """What is due, in the order in which it became so, until `room_bytes` are full."""
        effects: list[GatewayEffect] = []
        waiting: dict[LiveKey, None] = {}
        self._blocked = room_bytes <= 0
        for key in self._due:
            if (live := self._live.find(key)) is None:
                continue
            said, said_bytes = self._of(now_s, key, live, room_bytes)
            effects += said
            if room_bytes <= 0:
                waiting[key] = None
            else:
                self._look_at_s = min(self._look_at_s, live.session.next_wakeup_s())
            room_bytes -= said_bytes
        self._due = waiting
        if self._blocked:
            self._look_at_s = min(self._look_at_s, now_s + _LOOK_EVERY_S)
        return effects

    def next_wakeup_s(self) -> float:
        """When there is something to say; at once when only room was lacking for a part of it."""
        return 0.0 if self._due and not self._blocked else self._look_at_s

    def refuse(self, key: LiveKey, keys: GatewayAttempt, code: str) -> Publish:
        """An error as the whole answer. Nothing of it is kept: a later attempt may find room."""
        self._tally.add("refused")
        bundle = Bundle(first=0, status=Status.FAILED, code=code)
        return self._publish(key, keys.seal_response(bundle.encode(), final=True))

    def _of(
        self, now_s: float, key: LiveKey, live: Live, room_bytes: float
    ) -> tuple[list[GatewayEffect], int]:
        """What one request has to say, and how many bytes that is."""
        effects: list[GatewayEffect] = []
        said_bytes = 0
        for bundle in live.session.poll(now_s, room_bytes):
            final = bundle.status is not Status.MORE
            data = bundle.encode()
            message = live.keys.seal_response(
                data, final=final, at_least_bytes=at_least_bytes(len(data), self._timing)
            )
            effects.append(self._publish(key, message))
            said_bytes += len(message)
        released = live.session.take_released()
        if released and live.run is not None:
            effects.append(Release(live.run, released))
        if live.session.state is State.PARKED:
            self._tally.add("expired")
        if live.session.state in TERMINAL:
            self._tally.add("out_of_turn", live.session.out_of_turn)
            effects += self._live.drop(key)
        return effects, said_bytes

    def _publish(self, key: LiveKey, message: bytes) -> Publish:
        self._tally.add("sent")
        return Publish(topic=self._topics.response(key.handle), payload=message)
