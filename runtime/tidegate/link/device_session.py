"""One request as the device sees it: sans-I/O, driven by events and a clock value.

    QUEUED -> SENT -> ACCEPTED -> STREAMING -> DONE | FAILED | CANCELLED      (`device_states`)

Time is monotonic seconds, passed in. Every method returns what to do; whoever calls does it, in
order, writing to the outbox before the network hears about it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tidegate.link.device_states import STEPS, TERMINAL, Event, State
from tidegate.link.messages import MAX_ANSWER_BYTES, Bundle, Status
from tidegate.link.timing import Timing, backoff_s

MAX_ATTEMPT = 0xFFFF
_NUDGE_S = 0.05
_SOON_S = 0.5
"""All devices of a gateway hear the same advert: they do not all ask in the same instant."""
_QUIET = 1.5
"""Signs of life that a working gateway would have given."""
_UNDER_WAY = (State.SENT, State.ACCEPTED, State.STREAMING)


@dataclass(frozen=True, slots=True)
class SendAck:
    """Save what was delivered, then acknowledge it; `done` when it is the whole answer."""

    rewind: bool = False
    done: bool = False


@dataclass(frozen=True, slots=True)
class SendCancel:
    """Tell the gateway to stop."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """Payloads for the application, in order, each exactly once in this session's life."""

    first: int
    payloads: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class End:
    """The request is over; `code` is an error's stable name when it failed."""

    state: State
    code: str = ""


Action = SendAck | SendCancel | Deliver | End


class DeviceSession:
    """State of one request. `have` counts the payloads delivered in order."""

    def __init__(
        self,
        *,
        timing: Timing,
        rng: random.Random,
        now_s: float,
        deadline_s: float,
        connect_by_s: float | None,
        next_attempt: int = 0,
        have: int = 0,
        have_bytes: int = 0,
    ) -> None:
        self.state = State.QUEUED
        self.have = have
        self.next_attempt = next_attempt
        self.heard_attempt = 0
        """The newest attempt that anything was heard of: the gateway may not know a newer one."""
        self.seen = 0
        """One more than the highest chunk number opened of `heard_attempt`."""
        self.code = ""
        """Why it failed: an error's stable name."""
        self.out_of_turn = 0
        """Events that its state had no transition for; they changed nothing."""
        self.silent_sends = 0
        """Requests sent since anything was heard: the sign that a gateway has gone."""
        self._timing = timing
        self._rng = rng
        self._deadline_s = deadline_s
        self._connect_by_s = connect_by_s
        self._answer_bytes = have_bytes
        self._send_at_s = now_s
        self._heard_at_s = now_s
        """When we last sent the request, or heard of it."""
        self._ack_at_s: float | None = None
        self._unacked = 0
        self._gap = False
        self._early: dict[int, Bundle] = {}
        self._terminal: Bundle | None = None

    @property
    def deadline_s(self) -> float:
        return self._deadline_s

    def next_wakeup_s(self) -> float:
        """When `poll` next has something to do."""
        due = [self._deadline_s, self._send_at_s]
        if self._connect_by_s is not None:
            due.append(self._connect_by_s)
        if self._ack_at_s is not None:
            due.append(self._ack_at_s)
        return min(due)

    def nudge(self, now_s: float) -> None:
        """The connection came (back) up: what was in flight may be lost, so ask again soon."""
        self._send_at_s = min(self._send_at_s, now_s + self._rng.uniform(0.0, _NUDGE_S))

    def gateway_lives(self, now_s: float) -> None:
        """Its gateway has just announced itself: if it owes us a word, ask it soon.

        It may have lost our request, or itself been away: why wait until its silence is over?
        """
        quiet_s = now_s - self._heard_at_s
        owes = self._timing.resend_min_s if self.silent_sends else _QUIET * self._timing.heartbeat_s
        if self.state in _UNDER_WAY and quiet_s >= owes:
            self._send_at_s = min(self._send_at_s, now_s + self._rng.uniform(0.0, _SOON_S))

    def postpone(self, now_s: float) -> None:
        """The request cannot be sent now (no gateway is known): try again a little later."""
        self._send_at_s = now_s + self._timing.resend_min_s

    def wait_turn(self, now_s: float) -> None:
        """There is a gateway, but the window is full: others go first."""
        self._connect_by_s = None
        self.postpone(now_s)

    def stop(self, code: str) -> list[Action]:
        """End it from our side; the gateway is told if it may know of it."""
        return self._stop(code) if self._may(Event.FAIL) else []

    def poll(self, now_s: float) -> list[Action]:
        """Whatever is due at `now_s`, except sending, which `due_to_send` decides."""
        if self.state in TERMINAL:
            return []
        if now_s >= self._deadline_s:
            return self._stop("deadline_exceeded")
        if self._connect_by_s is not None and now_s >= self._connect_by_s:
            return self._stop("no_gateway")
        if self.next_attempt > MAX_ATTEMPT:
            return self._stop("too_many_attempts")
        if self._ack_at_s is not None and now_s >= self._ack_at_s:
            return [self._ack(now_s)]
        return []

    def due_to_send(self, now_s: float) -> bool:
        return self.state not in TERMINAL and now_s >= self._send_at_s

    def send(self, now_s: float) -> int:
        """The caller has a gateway for it, and it is due: the attempt to seal it under."""
        assert self._may(Event.SEND), "what is over is never due"
        self._go(Event.SEND)
        self._connect_by_s = None
        self._heard_at_s = now_s
        self._send_at_s = now_s + backoff_s(self.silent_sends, self._rng, self._timing)
        self.silent_sends += 1
        attempt = self.next_attempt
        self.next_attempt += 1
        return attempt

    def cancel(self) -> list[Action]:
        """The application gave up."""
        if not self._may(Event.CANCEL):
            return []
        sent = self.next_attempt > 0
        self._go(Event.CANCEL)
        return [*([SendCancel()] if sent else []), End(State.CANCELLED)]

    def on_bundle(self, now_s: float, attempt: int, number: int, bundle: Bundle) -> list[Action]:
        """Chunk `number` of the stream that answers `attempt` was opened."""
        if not self._may(Event.LIFE):
            return []
        if bundle.status is Status.FAILED and attempt < self.heard_attempt:
            # A late refusal: a newer attempt has been taken up, and says itself how it ends.
            return []
        self.silent_sends = 0
        self._heard_at_s = now_s
        if attempt > self.heard_attempt:
            self.heard_attempt, self.seen = attempt, 0
        if attempt == self.heard_attempt:
            self.seen = max(self.seen, number + 1)
        self._send_at_s = now_s + self._timing.silence_s * self._rng.uniform(1.0, 1.5)
        if bundle.status is not Status.MORE:
            self._terminal = bundle
        self._unacked += 1
        self._keep_early(bundle)
        actions = self._deliver_in_order()
        if self._answer_bytes > MAX_ANSWER_BYTES:
            return actions + self._stop("answer_too_large")
        self._go(Event.PAYLOAD if actions else Event.LIFE)
        end = self._ending()
        if end is not None:
            return [*actions, SendAck(done=True), end]
        return actions + self._acknowledge(now_s, bundle)

    def _keep_early(self, bundle: Bundle) -> None:
        """Hold a bundle until its turn; no more of them than the gateway has credit for."""
        held = self._early.get(bundle.first)
        if not bundle.payloads or bundle.end <= self.have:
            return
        longer = held is not None and held.end < bundle.end
        # What comes next always has room, or a full store would wait for it for ever.
        room = bundle.first <= self.have or len(self._early) < self._timing.credit
        if longer or (held is None and room):
            self._early[bundle.first] = bundle

    def _deliver_in_order(self) -> list[Action]:
        start = self.have
        payloads: list[bytes] = []
        while (first := min(self._early, default=self.have + 1)) <= self.have:
            fresh = self._early.pop(first).payloads[self.have - first :]
            payloads += fresh
            self.have += len(fresh)
        if not payloads:
            return []
        self._answer_bytes += sum(map(len, payloads))
        return [Deliver(start, tuple(payloads))]

    def _ending(self) -> End | None:
        terminal = self._terminal
        if terminal is None or self.have < terminal.end:
            return None
        if terminal.status is Status.FAILED:
            return self._fail(terminal.code)
        if self.have > terminal.end:
            # Another gateway, or another model, produced a shorter answer: never splice the two.
            return self._fail("answer_diverged")
        self._go(Event.COMPLETE)
        return End(State.DONE)

    def _acknowledge(self, now_s: float, bundle: Bundle) -> list[Action]:
        had_gap = self._gap
        self._gap = bool(self._early) or max(bundle.first, self._expected_end()) > self.have
        if (self._gap and not had_gap) or self._unacked * 4 >= self._timing.credit:
            return [self._ack(now_s)]
        if self._ack_at_s is None:
            self._ack_at_s = now_s + self._timing.ack_delay_s
        return []

    def _expected_end(self) -> int:
        return 0 if self._terminal is None else self._terminal.end

    def _ack(self, now_s: float) -> SendAck:
        self._unacked = 0
        # While something is missing, keep asking: the gateway ignores askings that crossed.
        self._ack_at_s = now_s + self._timing.heartbeat_s if self._gap else None
        return SendAck(rewind=self._gap)

    def _stop(self, code: str) -> list[Action]:
        sent = self.next_attempt > 0
        return [*([SendCancel()] if sent else []), self._fail(code)]

    def _fail(self, code: str) -> End:
        self._go(Event.FAIL)
        self.code = code
        return End(State.FAILED, code)

    def _may(self, event: Event) -> bool:
        """Whether the state has a transition for it; one that has none is counted."""
        known = event in STEPS[self.state]
        self.out_of_turn += not known
        return known

    def _go(self, event: Event) -> None:
        self.state = STEPS[self.state][event].to
