"""Requests that are over at the device while a gateway may not have heard so.

A lost DONE or CANCEL would keep a generation or an answer alive at the gateway until its lease
ends. So the device remembers its keys for one lease, and when a gateway goes on about such a
request it says the last word again, but not more often than it acknowledges.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from tidegate.errors import SealError
from tidegate.link.envelope import DeviceAttempt, RequestId, Route
from tidegate.link.messages import Control
from tidegate.link.timing import Timing

_KEPT = 256


@dataclass(frozen=True, slots=True)
class Sent:
    """An attempt under way: its keys, and the gateway that has it with its topic."""

    keys: DeviceAttempt = field(repr=False)
    topic: str
    gateway_id: str
    certified_s: int = 0
    """When the key was certified by which it must answer."""


@dataclass(slots=True)
class _Last:
    """The last word on a request, and when to say it."""

    sent: Mapping[int, Sent]
    control: Control
    until_s: float
    quiet_until_s: float


class Lingering:
    """The last words of the requests that ended during the last lease."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._words: OrderedDict[RequestId, _Last] = OrderedDict()

    def add(
        self, now_s: float, request_id: RequestId, sent: Mapping[int, Sent], control: Control
    ) -> None:
        """`control` has been said on `request_id`; be ready to say it again."""
        self._words[request_id] = _Last(
            sent=sent,
            control=control,
            until_s=now_s + self._timing.lease_s,
            quiet_until_s=now_s + self._timing.ack_delay_s,
        )
        while len(self._words) > _KEPT:
            self._words.popitem(last=False)

    def answer(self, now_s: float, where: Route, payload: bytes) -> tuple[Sent, Control] | None:
        """What to say to `payload`, if anything now.

        Raises:
            SealError: it is about no request of ours, or does not open.
        """
        last = self._words.get(where.request_id)
        sent = None if last is None else last.sent.get(where.attempt)
        if last is None or sent is None:
            raise SealError
        sent.keys.open_response(payload)
        if now_s < last.quiet_until_s:
            return None
        last.quiet_until_s = now_s + self._timing.ack_delay_s
        return sent, last.control

    def expire(self, now_s: float) -> None:
        """Forget what ended a lease ago."""
        while self._words and next(iter(self._words.values())).until_s <= now_s:
            self._words.popitem(last=False)
