"""The device end without I/O of its own but the outbox: events and a clock in, effects out.

One core is used by one thread. Whatever must survive a crash is in the outbox before the effect
that depends on it is returned, so dropping a core between any two writes loses nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tidegate.errors import LinkError, SealError
from tidegate.link.counters import Tally
from tidegate.link.device_dispatch import Dispatcher, nudge_queued
from tidegate.link.device_live import Keeper, Live
from tidegate.link.device_sealing import DeviceSealer
from tidegate.link.device_session import (
    Action,
    Deliver,
    DeviceSession,
    End,
    SendAck,
    SendCancel,
)
from tidegate.link.device_states import State
from tidegate.link.device_views import Standing
from tidegate.link.effects import Delivered, DeviceEffect, Ended
from tidegate.link.envelope import RequestId, Route, route
from tidegate.link.gateway_directory import GatewayDirectory
from tidegate.link.gateway_revocation import RevokedGateways
from tidegate.link.identity import DeviceIdentity
from tidegate.link.limits import MAX_DEADLINE_S, check_request
from tidegate.link.lingering import Lingering
from tidegate.link.messages import Bundle, Control, ControlKind, Prefix, Status
from tidegate.link.outbox import (
    NORMAL_PRIORITY,
    OUTBOX_FULL,
    Held,
    Name,
    Outbox,
    OutboxRow,
    Outcome,
)
from tidegate.link.prekeys import Advert
from tidegate.link.suites import PREFERENCE
from tidegate.link.timing import Timing
from tidegate.link.topics import Topics
from tidegate.link.transport import Connected, Disconnected, Message, TransportEvent

_EXPIRE_EVERY_S = 600.0
_LOOK_EVERY_S = 0.1
"""While nothing may be sent: deadlines pass all the same."""


class DeviceCore:
    """All requests of one device."""

    def __init__(
        self,
        *,
        identity: DeviceIdentity,
        outbox: Outbox,
        timing: Timing,
        rng: random.Random,
        wall_s: Callable[[], float],
        now_s: float,
        suites: Sequence[int] = PREFERENCE,
        revoked: RevokedGateways | None = None,
    ) -> None:
        self.tally = Tally()
        self.connected = False
        self._identity = identity
        self._topics = Topics(identity.group)
        self._outbox = outbox
        self._timing = timing
        self._rng = rng
        self._wall_s = wall_s
        self._gateways = GatewayDirectory(
            identity,
            timing=timing,
            rng=rng,
            wall_s=wall_s,
            tally=self.tally,
            suites=suites,
            revoked=revoked,
        )
        self._keep = Keeper(outbox, self.tally)
        self._seal = DeviceSealer(
            identity=identity,
            timing=timing,
            wall_s=wall_s,
            tally=self.tally,
            suites=self._gateways.suites,
        )
        self._dispatch = Dispatcher(
            gateways=self._gateways,
            keep=self._keep,
            seal=self._seal,
            timing=timing,
            tally=self.tally,
        )
        self._live: dict[RequestId, Live] = {}
        self._lingering = Lingering(timing)
        self._expire_at_s = now_s
        self._look_at_s = -math.inf  # No request has anything to do before.
        self._to_acknowledge: dict[RequestId, bool] = {}
        """Whether the stream has to go back."""
        for request_id, outcome in outbox.ids():
            if outcome is Outcome.OPEN:
                self._resume(now_s, request_id)

    @property
    def advert_problem(self) -> str:
        """Why the last advert was rejected, for people; empty when none was."""
        return self._gateways.problem

    @property
    def filters(self) -> tuple[str, ...]:
        """Topic filters to subscribe to before anything is sent."""
        return self._topics.every_advert, self._topics.response(self._identity.handle)

    def gateways(self, now_s: float) -> list[Advert]:
        """Adverts that are valid now, the least loaded first."""
        return self._gateways.alive(now_s)

    def submit(
        self,
        now_s: float,
        body: bytes,
        *,
        request_id: RequestId,
        deadline_s: float,
        model: str | None,
        priority: int = NORMAL_PRIORITY,
        name: Name | None = None,
        gateway: str | None = None,
    ) -> None:
        """Accept a request: it is in the outbox when this returns. `poll` sends it.

        Of those that wait, the one with the lowest `priority` goes first, then the oldest.
        `gateway` is the only one to ask; after a restart any will do.

        Raises:
            RequestError: see `limits.check_request`.
            CapacityError: the outbox is full.
        """
        wall_ms = int(self._wall_s() * 1000)
        check_request(body, request_id, deadline_s, now_ms=wall_ms)
        deadline_ms = wall_ms + int(deadline_s * 1000)
        self._outbox.add(
            request_id, body, deadline_ms=deadline_ms, model=model, priority=priority, name=name
        )
        # Who has had a gateway waits for it or another one; who has never had one is told so.
        seen = self._gateways.has_seen(model, gateway)
        connect_by_s = None if seen else now_s + self._timing.connect_timeout_s
        self._resume(now_s, request_id, connect_by_s=connect_by_s)
        if (live := self._live.get(request_id)) is not None:
            live.only = gateway

    def standing(self, request_id: RequestId) -> Standing | None:
        """What is known of `request_id`, or None.

        Raises:
            LinkError: what is stored of it is damaged.
        """
        live = self._live.get(request_id)
        if live is not None:
            self._keep.save(live)
        row = self._outbox.find(request_id)
        if row is None:
            return None
        return Standing(self._outbox.payloads(request_id), row.outcome, row.code)

    def remaining_s(self, now_s: float, request_id: RequestId) -> float | None:
        """How long `request_id` may still take, or None when it is over or unknown."""
        live = self._live.get(request_id)
        return None if live is None else live.session.deadline_s - now_s

    def stored(self) -> list[Held]:
        """Every request in the outbox, oldest first."""
        return self._outbox.held()

    def named(self, key: str) -> OutboxRow | None:
        """The request that was submitted under this name, if it is still here.

        Raises:
            LinkError: what is stored of it is damaged.
        """
        return self._outbox.find_named(key)

    def release(self, request_id: RequestId) -> None:
        """The application has read the whole answer, or the error."""
        if request_id not in self._live:
            self._keep.wrote(lambda outbox: outbox.remove(request_id))

    def cancel(self, now_s: float, request_id: RequestId) -> list[DeviceEffect]:
        """The application gave up on `request_id`."""
        live = self._live.get(request_id)
        if live is None:
            self.release(request_id)
            return []
        return self._perform(now_s, live, live.session.cancel())

    def use_key(self, key: Ed25519PrivateKey) -> None:
        """Sign requests with this key of the device from their next attempt on."""
        self._seal.use_key(key)

    def on_connected(self, now_s: float) -> None:
        """The broker can be reached and our subscriptions stand."""
        self.connected = True
        for live in self._live.values():
            live.session.nudge(now_s)
            self._touch(live)

    def on_disconnected(self) -> None:
        self.connected = False

    def turn(
        self, now_s: float, events: Sequence[TransportEvent], *, may_send: bool = True
    ) -> list[DeviceEffect]:
        """Everything since the last turn. Never raises for what a peer or a broker can send.

        Without `may_send` no request is sent: what was sent before has not left yet.
        """
        effects: list[DeviceEffect] = []
        for event in events:
            match event:
                case Message(topic, payload):
                    effects += self._take_message(now_s, topic, payload)
                case Connected():
                    self.on_connected(now_s)
                case Disconnected():
                    self.on_disconnected()
        return effects + self.poll(now_s, may_send=may_send)

    def receive(self, now_s: float, topic: str, payload: bytes) -> list[DeviceEffect]:
        """One message, and the acknowledgement that it makes due."""
        return self._take_message(now_s, topic, payload) + self._acknowledge()

    def _take_message(self, now_s: float, topic: str, payload: bytes) -> list[DeviceEffect]:
        if self._topics.is_advert(topic):
            if self._dispatch.take_advert(now_s, topic, payload, self._live.values()):
                self._look_at_s = now_s
            return []
        try:
            return self._on_response(now_s, payload)
        except (SealError, ValueError):
            self.tally.add("dropped")
            return []

    def poll(self, now_s: float, *, may_send: bool = True) -> list[DeviceEffect]:
        """Do whatever is due; see `turn`."""
        if now_s >= self._expire_at_s:
            self._expire_at_s = now_s + _EXPIRE_EVERY_S
            wall_ms = int(self._wall_s() * 1000)
            self._keep.wrote(lambda outbox: outbox.expire(wall_ms))
        self._lingering.expire(now_s)
        effects: list[DeviceEffect] = []
        if now_s >= self._look_at_s:
            for live in list(self._live.values()):
                effects += self._perform(now_s, live, live.session.poll(now_s))
            if may_send:
                requests = self._live.values()
                effects += self._dispatch.send_due(now_s, requests, online=self.connected)
            waits = [live.session.next_wakeup_s() for live in self._live.values()]
            self._look_at_s = min(waits, default=math.inf)
            if not may_send:
                self._look_at_s = max(self._look_at_s, now_s + _LOOK_EVERY_S)
        return effects + self._acknowledge()

    def next_wakeup_s(self) -> float:
        """When `poll` next has something to do."""
        return min(self._expire_at_s, self._look_at_s)

    def _touch(self, live: Live) -> None:
        """Something has happened to it: it may have something to do earlier than it said."""
        self._look_at_s = min(self._look_at_s, live.session.next_wakeup_s())

    def _resume(
        self, now_s: float, request_id: RequestId, *, connect_by_s: float | None = None
    ) -> None:
        try:
            row = self._outbox.find(request_id)
            payloads = self._outbox.payloads(request_id)
        except LinkError:
            self._keep.wrote(
                lambda outbox: outbox.save(
                    request_id, 0, (), outcome=Outcome.FAILED, code="damaged"
                )
            )
            return
        assert row is not None
        # The wall clock may have jumped since; no request was ever given more than this.
        remaining_s = min(row.deadline_ms / 1000 - self._wall_s(), MAX_DEADLINE_S)
        session = DeviceSession(
            timing=self._timing,
            rng=self._rng,
            now_s=now_s,
            deadline_s=now_s + remaining_s,
            connect_by_s=connect_by_s,
            next_attempt=row.attempt,
            have=len(payloads),
            have_bytes=sum(map(len, payloads)),
        )
        live = Live(row=row, session=session, saved=len(payloads), prefix=Prefix(payloads))
        self._live[request_id] = live
        self._touch(live)

    def _on_response(self, now_s: float, payload: bytes) -> list[DeviceEffect]:
        where = route(payload)
        live = self._live.get(where.request_id)
        if live is None:
            return self._on_late_response(now_s, where, payload)
        sent = live.sent.get(where.attempt)
        if sent is None or self._gateways.is_revoked(sent.gateway_id, sent.certified_s):
            raise SealError
        number, final, data = sent.keys.open_response(payload)
        if not (data or final):
            # A filler: it keeps the size and the beat of a stream constant and says nothing.
            return []
        bundle = Bundle.decode(data)
        if final != (bundle.status is not Status.MORE):
            raise SealError
        self.tally.add("opened")
        self._gateways.heard(sent.gateway_id)
        session = live.session
        if self._dispatch.goes_elsewhere(now_s, live, where.attempt, bundle):
            self._touch(live)
            return []
        if bundle.payloads and bundle.end <= session.have:
            self.tally.add("duplicates")
        if not self._keep.fits(bundle.payloads):
            return self._perform(now_s, live, session.stop(OUTBOX_FULL))
        actions = session.on_bundle(now_s, where.attempt, number, bundle)
        return self._perform(now_s, live, actions)

    def _on_late_response(self, now_s: float, where: Route, payload: bytes) -> list[DeviceEffect]:
        word = self._lingering.answer(now_s, where, payload)
        self.tally.add("duplicates")
        return [] if word is None else [self._seal.say(*word)]

    def _perform(self, now_s: float, live: Live, actions: list[Action]) -> list[DeviceEffect]:
        effects: list[DeviceEffect] = []
        for action in actions:
            match action:
                case Deliver(first, payloads):
                    self._keep.take(live, payloads)
                    request_id = live.row.request_id
                    effects.append(Delivered(request_id=request_id, first=first, payloads=payloads))
                case SendAck(rewind, done=False):
                    self._to_acknowledge[live.row.request_id] = rewind
                case SendAck():
                    if self._keep.save(live):
                        effects += self._seal.control(live, ControlKind.DONE)
                case SendCancel():
                    effects += self._seal.control(live, ControlKind.CANCEL)
                case End(state, code):
                    effects.append(self._end(now_s, live, state, code))
        self._touch(live)
        return effects

    def _acknowledge(self) -> list[DeviceEffect]:
        """Save what has come for the requests whose acknowledgement is due, then say so."""
        if not self._to_acknowledge:
            return []
        asked, self._to_acknowledge = self._to_acknowledge, {}
        lives = [live for name in asked if (live := self._live.get(name)) is not None]
        if not self._keep.save_all(lives):
            return []
        effects: list[DeviceEffect] = []
        for live in lives:
            rewind = asked[live.row.request_id]
            effects += self._seal.control(live, ControlKind.ACK, rewind=rewind)
        return effects

    def _end(self, now_s: float, live: Live, state: State, code: str) -> Ended:
        request_id = live.row.request_id
        del self._live[request_id]
        self.tally.add("out_of_turn", live.session.out_of_turn)
        if state is State.CANCELLED:
            kept = self._keep.wrote(lambda outbox: outbox.remove(request_id))
            self.tally.add("cancelled")
        else:
            kept = self._keep.end(live)
            self.tally.add("completed" if state is State.DONE else "failed")
        self._keep.forget(live)
        nudge_queued(now_s, self._live.values())
        self._look_at_s = now_s
        if live.sent and kept:
            kind = ControlKind.DONE if state is State.DONE else ControlKind.CANCEL
            seen, have = live.session.seen, live.session.have
            control = Control(kind=kind, have=have, credit=1, seen=seen)
            self._lingering.add(now_s, request_id, live.sent, control)
        return Ended(request_id=request_id, state=state, code=code)
