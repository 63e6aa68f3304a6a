"""A request that is not over at the device, and how much of it the outbox has.

Whatever the network may hear of is written first: `Keeper` says whether that went well, and a
caller that gets False claims nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tidegate.errors import CapacityError
from tidegate.link.at_rest import SEALED_OVERHEAD_BYTES
from tidegate.link.counters import Tally
from tidegate.link.device_session import DeviceSession
from tidegate.link.device_states import State
from tidegate.link.lingering import Sent
from tidegate.link.messages import Prefix
from tidegate.link.outbox import Growth, Outbox, OutboxRow, Outcome

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
    refused_by: set[str] = field(default_factory=set)
    """Gateways that had no room for it."""
    only: str | None = None
    """The gateway that it is for; None for any. Another process of ours does not know it."""
    unsaved: list[bytes] = field(default_factory=list, repr=False)

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
        self._unsaved_bytes = 0

    def fits(self, payloads: Sequence[bytes]) -> bool:
        """The outbox has room for `payloads` beside all that is not saved yet."""
        new_bytes = self._unsaved_bytes + _stored_bytes(payloads)
        fit = True

        def make_room(outbox: Outbox) -> None:
            nonlocal fit
            fit = outbox.make_room(new_bytes)

        # A disk that refuses is another matter than a full outbox: see `save`.
        return not self.wrote(make_room) or fit

    def take(self, live: Live, payloads: tuple[bytes, ...]) -> None:
        """Payloads that the application is about to get, in order."""
        live.unsaved += payloads
        self._unsaved_bytes += _stored_bytes(payloads)
        for payload in payloads:
            live.prefix.add(payload)

    def forget(self, live: Live) -> None:
        """What it has not saved is not worth it any more."""
        self._unsaved_bytes -= _stored_bytes(live.unsaved)
        live.unsaved = []

    def wrote(self, write: Callable[[Outbox], None]) -> bool:
        """Do `write`; False when the disk refuses, and then nothing may depend on it."""
        dropped = self._outbox.dropped
        try:
            write(self._outbox)
        except CapacityError:
            self._tally.add("store_failures")
            return False
        finally:
            self._tally.add("answers_dropped", self._outbox.dropped - dropped)
        return True

    def save(self, live: Live) -> bool:
        """Bring the outbox up to date with `live`; False when the disk refuses."""
        return self.save_all([live])

    def save_all(self, lives: Sequence[Live]) -> bool:
        """Bring the outbox up to date with all of them in one go; False when the disk refuses."""
        behind = [live for live in lives if live.unsaved or self._outcome(live) is not live.outcome]
        if not behind:
            return True
        growth = [
            Growth(
                request_id=live.row.request_id,
                first=live.saved,
                payloads=live.unsaved,
                outcome=self._outcome(live),
                code=live.session.code,
            )
            for live in behind
        ]
        if not self.wrote(lambda outbox: outbox.save_all(growth)):
            return False
        for live in behind:
            live.saved += len(live.unsaved)
            self.forget(live)
            live.outcome = self._outcome(live)
        return True

    def end(self, live: Live) -> bool:
        """Save how it ended; False when the disk refuses.

        Another request may have taken the room that its last payloads need. Of an answer that
        failed nobody misses them, and without the failure it would stay open to its deadline.
        """
        if self.save(live):
            return True
        if self._outcome(live) is not Outcome.FAILED:
            return False
        self.forget(live)
        return self.save(live)

    def _outcome(self, live: Live) -> Outcome:
        return _OUTCOMES.get(live.session.state, Outcome.OPEN)


def _stored_bytes(payloads: Sequence[bytes]) -> int:
    return sum(map(len, payloads)) + SEALED_OVERHEAD_BYTES * len(payloads)
