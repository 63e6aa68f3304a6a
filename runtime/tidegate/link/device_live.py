"""A request that is not over at the device, and how much of it the outbox has.

Whatever the network may hear of is written first: `Keeper` says whether that went well, and a
caller that gets False claims nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from tidegate.errors import CapacityError
from tidegate.link.counters import Tally
from tidegate.link.device_session import DeviceSession, State
from tidegate.link.lingering import Sent
from tidegate.link.messages import Prefix
from tidegate.link.outbox import Outbox, OutboxRow, Outcome

_ATTEMPTS_KEPT = 4
_OUTCOMES = {State.DONE: Outcome.DONE, State.FAILED: Outcome.FAILED}


@dataclass(slots=True)
class Live:
    """A request that is not over: `saved` of its payloads are in the outbox, `unsaved` are not."""

    row: OutboxRow
    session: DeviceSession
    saved: int
    prefix: Prefix
    outcome: Outcome = Outcome.OPEN
    sent: OrderedDict[int, Sent] = field(default_factory=OrderedDict)
    gateway_id: str | None = None
    unsaved: list[bytes] = field(default_factory=list, repr=False)

    def take(self, payloads: tuple[bytes, ...]) -> None:
        """Payloads that the application is about to get, in order."""
        self.unsaved += payloads
        for payload in payloads:
            self.prefix.add(payload)

    def remember(self, attempt: int, sent: Sent) -> None:
        """Keep the keys of `attempt`, and of a few before it whose answers may still arrive."""
        self.sent[attempt] = sent
        while len(self.sent) > _ATTEMPTS_KEPT:
            self.sent.popitem(last=False)


class Keeper:
    """Writes to the outbox; a disk that refuses is counted, not raised."""

    def __init__(self, outbox: Outbox, tally: Tally) -> None:
        self._outbox = outbox
        self._tally = tally

    def wrote(self, write: Callable[[Outbox], None]) -> bool:
        """Do `write`; False when the disk refuses, and then nothing may depend on it."""
        try:
            write(self._outbox)
        except CapacityError:
            self._tally.add("store_failures")
            return False
        return True

    def save(self, live: Live) -> bool:
        """Bring the outbox up to date with `live`; False when the disk refuses."""
        outcome = _OUTCOMES.get(live.session.state, Outcome.OPEN)
        if not live.unsaved and outcome is live.outcome:
            return True
        saved = self.wrote(
            lambda outbox: outbox.save(
                live.row.request_id,
                live.saved,
                live.unsaved,
                outcome=outcome,
                code=live.session.code,
            )
        )
        if not saved:
            return False
        live.saved += len(live.unsaved)
        live.unsaved = []
        live.outcome = outcome
        return True
