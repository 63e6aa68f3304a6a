"""One request as the gateway sees it: the mirror of `device_session`, just as sans-I/O.

    ACCEPTED -> STREAMING -> FINISHED -> CLOSED | CANCELLED | PARKED          (`gateway_states`)

It keeps every payload until the device has acknowledged the end, so that any attempt of the
device can be served again from any payload on.
"""

from __future__ import annotations

import math
from collections import deque

from tidegate.link.gateway_pacing import Beat, usable_bytes
from tidegate.link.gateway_states import STEPS, TERMINAL, Event, State
from tidegate.link.messages import (
    Bundle,
    Control,
    Prefix,
    Status,
    bundle_from,
    same_but_last,
)
from tidegate.link.timing import Timing

DIVERGED = "answer_diverged"
"""Error code: a run did not repeat what an earlier one had said."""


class GatewaySession:
    """State of one live request.

    `payloads` starts with what an earlier life stored. The handler repeats it, because it is
    deterministic, and each repetition is compared and skipped; the same goes for payloads that
    the device has from another gateway. A difference fails the request: two answers are never
    spliced. Only the last payload may differ, and only if the answer ends with it: the event that
    ends an answer carries times.
    """

    def __init__(self, *, timing: Timing, now_s: float, stored: list[bytes]) -> None:
        self.state = State.ACCEPTED
        self.payloads = stored
        self.out_of_turn = 0
        """Events that its state had no transition for; they changed nothing."""
        self._timing = timing
        self._beat = Beat(timing)
        self._owed = len(stored)
        self._must_end = False
        self._claim: tuple[int, bytes] | None = None
        self._ending: tuple[Status, str] | None = None
        self._peak = len(stored)
        self.on_request(now_s, have=0, credit=timing.credit, ttl_s=math.inf)

    def produce(self, payload: bytes) -> int | None:
        """The handler yielded `payload`; returns its index, or None when there is no new one.

        That is a repetition, or a payload that shows the run to have `diverged`.
        """
        if not self._may(Event.PRODUCE):
            return None
        if self._owed:
            same = payload == self.payloads[-self._owed]
            self._owed -= 1
            if not same and self._owed:
                self._diverge(len(self.payloads))
            self._must_end = self._must_end or not same
            return None
        if self._must_end:
            self._diverge(len(self.payloads))
            return None
        self._go(Event.PRODUCE)
        self.payloads.append(payload)
        self._check_claim()
        return None if self.diverged else len(self.payloads) - 1

    def finish(self, status: Status, code: str) -> tuple[Status, str]:
        """The handler ended; returns how the answer ends, which may be otherwise."""
        if not self._may(Event.FINISH):
            return status, code
        if self._owed and status is Status.COMPLETE:
            self._diverge(len(self.payloads))
        if self._ending is None:
            self.end(status, code)
        assert self._ending is not None
        return self._ending

    def end(self, status: Status, code: str) -> None:
        """The answer is all there: a stored one is not produced again."""
        self._go(Event.FINISH)
        self._ending = (status, code)

    @property
    def diverged(self) -> bool:
        """A run, ours or the device's, said something else: the request fails."""
        return self._ending is not None and self._ending[1] == DIVERGED

    @property
    def repeating(self) -> bool:
        """The handler's next payload has been stored by an earlier run."""
        return self._owed > 0

    def _check_claim(self) -> None:
        """Compare what the device says it has with ours, once we have as much."""
        if self._claim is None or len(self.payloads) < self._claim[0]:
            return
        (have, proof), self._claim = self._claim, None
        ours = Prefix(self.payloads[:have]).proof()
        if ours == proof:
            return
        if same_but_last(ours, proof) and have == len(self.payloads):
            self._must_end = True
        else:
            self._diverge(have)

    def _diverge(self, have: int) -> None:
        """Fail it, and send nothing beyond the first `have` payloads."""
        self._go(Event.FINISH)
        del self.payloads[have:]
        self._ending = (Status.FAILED, DIVERGED)
        self._final_sent = False

    def on_request(
        self, now_s: float, *, have: int, credit: int, ttl_s: float, proof: bytes | None = None
    ) -> None:
        """The device asked (again) under a new attempt: new keys, from `have` on.

        `proof` is `messages.Prefix.proof` of what the device has.
        """
        if not self._may(Event.ATTACH):
            return
        self._go(Event.ATTACH)
        self._acked = have
        self._sent = have
        self._credit = max(1, min(credit, self._timing.credit))
        self._in_flight: deque[tuple[int, int]] = deque()
        self._number = 0
        self._rewind_number = -1
        self._final_sent = False
        self._life_at_s = now_s
        self._lease_until_s = now_s + self._timing.lease_s
        self._expires_s = now_s + ttl_s
        self._claim = None if proof is None or have == 0 else (have, proof)
        self._check_claim()

    def hint_gone(self, now_s: float) -> None:
        """Somebody who need not know says that the device is gone: believe it if it stays quiet.

        A device that is there acknowledges every sign of life, and that restores its lease.
        """
        self._lease_until_s = min(self._lease_until_s, now_s + self._timing.silence_s)

    def on_ack(self, now_s: float, control: Control) -> bool:
        """Acknowledgement; returns True when it sent the stream back."""
        if not self._may(Event.ACK):
            return False
        self._go(Event.ACK)
        self._lease_until_s = now_s + self._timing.lease_s
        self._credit = max(1, min(control.credit, self._timing.credit))
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
        if self._may(Event.DONE):
            self._go(Event.DONE)

    def cancel(self) -> None:
        """The device gave up."""
        if self._may(Event.CANCEL):
            self._go(Event.CANCEL)

    def poll(self, now_s: float, room_bytes: float = math.inf) -> list[Bundle]:
        """Bundles to seal and publish now, in order: they are the attempt's next chunks.

        Payloads that fill `room_bytes` are the last; without room there are none, and no sign of
        life either.
        """
        if self.state in TERMINAL:
            return []
        if now_s >= min(self._lease_until_s, self._expires_s):
            self._go(Event.LEASE_END)
            return []
        if room_bytes <= 0:
            return []
        if self._timing.is_constant:
            bundles = self._at_constant_rate(now_s)
        else:
            bundles = self._ready(now_s, room_bytes)
        if not bundles and now_s >= self._life_at_s:
            bundles.append(self._sign_of_life())
        if bundles:
            self._life_at_s = now_s + self._timing.heartbeat_s
        return bundles

    def next_wakeup_s(self) -> float:
        """When `poll` next has something to do if nothing else happens."""
        due = min(self._life_at_s, self._lease_until_s, self._expires_s)
        return due if self._beat.at_s is None else min(due, self._beat.at_s)

    def _ready(self, now_s: float, room_bytes: float) -> list[Bundle]:
        """All that the window and the room allow, on the beat."""
        bundles: list[Bundle] = []
        if not self._has_next():
            self._beat.rest()
            return bundles
        if not self._beat.due(now_s):
            return bundles
        while room_bytes > 0 and (bundle := self._next_bundle()) is not None:
            bundles.append(bundle)
            room_bytes -= sum(map(len, bundle.payloads))
        if self._has_next():
            self._beat.wait(now_s)
        return bundles

    def _at_constant_rate(self, now_s: float) -> list[Bundle]:
        """One chunk on every beat, filled or not, until all has been sent once."""
        all_sent = self._sent >= len(self.payloads) and not self._final_due()
        if self._ending is not None and all_sent:
            self._beat.rest()
            return []
        if not self._beat.due(now_s):
            return []
        bundle = self._next_bundle() or self._sign_of_life()
        if not self._final_sent:
            self._beat.due(now_s)
        return [bundle]

    def take_released(self) -> int:
        """Payloads sent for the first time since the last call: room for the handler."""
        reached = min(self._sent, len(self.payloads))
        released = max(0, reached - self._peak)
        self._peak += released
        return released

    def _next_bundle(self) -> Bundle | None:
        """The next chunk that is worth a place in the window."""
        if not self._has_next():
            return None
        return self._sent_as(bundle_from(self.payloads, self._sent, usable_bytes(self._timing)))

    def _has_next(self) -> bool:
        waiting = self._sent < len(self.payloads)
        return len(self._in_flight) < self._credit and (waiting or self._final_due())

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

    def _may(self, event: Event) -> bool:
        """Whether the state has a transition for it; one that has none is counted."""
        known = event in STEPS[self.state]
        self.out_of_turn += not known
        return known

    def _go(self, event: Event) -> None:
        self.state = STEPS[self.state][event].to
