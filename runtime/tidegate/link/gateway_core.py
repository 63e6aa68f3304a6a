"""The gateway end without I/O of its own but its store: events and a clock in, effects out.

One core is used by one thread. `Start` is returned only after the request's row is on the disk,
and a chunk is published only after it is in the store (see `GatewayStore.append`).

A `turn` takes in everything that has happened since the last one and then says what is due, so
that what came together is stored together. What does not find room to leave is not sealed: it
waits in its session, where more may join it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from tidegate.errors import CapacityError, LinkError, SealError
from tidegate.link.at_rest import SEALED_OVERHEAD_BYTES
from tidegate.link.counters import Tally
from tidegate.link.effects import (
    GatewayEffect,
    InboundRequest,
    Publish,
    Release,
    RunId,
    SomebodyCame,
    Start,
)
from tidegate.link.envelope import (
    GatewayAttempt,
    MessageType,
    request_time_ms,
    route,
)
from tidegate.link.gateway_keys import GatewayKeys
from tidegate.link.gateway_live import Live, LiveKey, LiveTable
from tidegate.link.gateway_output import Finished, Produced, take_output
from tidegate.link.gateway_saying import Speaker
from tidegate.link.gateway_session import GatewaySession
from tidegate.link.gateway_store import GatewayRow, GatewayStore, Progress, RequestKey
from tidegate.link.limits import MAX_AHEAD_S
from tidegate.link.messages import (
    Call,
    Control,
    ControlKind,
    Status,
)
from tidegate.link.prekeys import VALID_FOR_S, ModelOffer
from tidegate.link.timing import Timing
from tidegate.link.topics import GONE, HERE, Topics, last_level
from tidegate.link.transport import Message

logger = logging.getLogger(__name__)
_EXPIRE_EVERY_S = 60.0


class GatewayCore:
    """All requests at one gateway."""

    def __init__(
        self,
        *,
        keys: GatewayKeys,
        store: GatewayStore,
        timing: Timing,
        max_requests: int,
        wall_s: Callable[[], float],
        now_s: float,
    ) -> None:
        self.tally = Tally()
        self._keys = keys
        self._topics = Topics(keys.identity.group)
        self._store = store
        self._timing = timing
        self._wall_s = wall_s
        self._live = LiveTable(max_requests)
        self._speaker = Speaker(self._live, topics=self._topics, timing=timing, tally=self.tally)
        self._expire_at_s = now_s

    @property
    def filters(self) -> tuple[str, ...]:
        """Topic filters to subscribe to."""
        own = self._topics.every_request(self._keys.identity.gateway_id)
        return (own, self._topics.every_presence)

    @property
    def load(self) -> float:
        """Share of the allowed requests that are running, 0 to 1."""
        return self._live.load

    def advert(self, models: Sequence[ModelOffer], load: float | None) -> Publish:
        """A fresh signed advert; makes and drops prekeys as their time comes.

        Raises:
            CapacityError: the disk refuses to hold its version.
        """
        self._rotate()
        payload = self._keys.advert(
            version=self._store.next_advert_version(int(self._wall_s() * 1000)),
            models=models,
            load=self.load if load is None else load,
            valid_s=self._timing.advert_valid_s,
        )
        topic = self._topics.advert(self._keys.identity.gateway_id)
        return Publish(topic=topic, payload=payload, retain=True)

    def turn(
        self,
        now_s: float,
        messages: Sequence[Message],
        batch: Sequence[Produced],
        *,
        room_bytes: float = math.inf,
    ) -> list[GatewayEffect]:
        """Everything since the last turn: messages, outputs of handlers, time.

        Never raises for anything a peer or a broker can send. Payloads that fill `room_bytes` are
        the last to be sealed.
        """
        effects: list[GatewayEffect] = []
        for message in messages:
            effects += self._take_message(now_s, message.topic, message.payload)
        if batch:
            effects += self._take_outputs(batch)
        return effects + self.poll(now_s, room_bytes)

    def receive(self, now_s: float, topic: str, payload: bytes) -> list[GatewayEffect]:
        """One message, and what it makes due."""
        return self._take_message(now_s, topic, payload) + self._speaker.say(now_s, math.inf)

    def produced(self, now_s: float, batch: Sequence[Produced]) -> list[GatewayEffect]:
        """What handlers yielded, and what that makes due."""
        return self._take_outputs(batch) + self._speaker.say(now_s, math.inf)

    def _take_message(self, now_s: float, topic: str, payload: bytes) -> list[GatewayEffect]:
        handle = last_level(topic)
        if topic == self._topics.presence(handle):
            return self._on_presence(now_s, handle, payload)
        try:
            where = route(payload)
            key = LiveKey(handle, where.request_id)
            if where.kind in (MessageType.REQUEST, MessageType.PART):
                return self._on_request(now_s, key, payload)
            if where.kind is MessageType.CONTROL:
                return self._on_control(now_s, key, payload)
            raise SealError
        except (SealError, ValueError):
            self.tally.add("dropped")
        except CapacityError:
            self.tally.add("store_failures")
        return []

    def _on_presence(self, now_s: float, handle: str, payload: bytes) -> list[GatewayEffect]:
        """The broker says a device is gone, or here. It may be wrong or lie: both are hints."""
        if payload[:1] == GONE:
            for key, live in self._live:
                if key.handle == handle:
                    live.session.hint_gone(now_s)
                    self._speaker.touch(key)
        return [SomebodyCame()] if payload[:1] == HERE else []

    def _take_outputs(self, batch: Sequence[Produced]) -> list[GatewayEffect]:
        """What handlers yielded: stored in one transaction, and then due.

        When the disk refuses, the requests concerned are dropped and their devices ask again.
        """
        effects: list[GatewayEffect] = []
        progress: list[Progress] = []
        touched: dict[LiveKey, None] = {}
        room_bytes = min(self._store.room_bytes, self._live.room_bytes)
        for item in batch:
            if (found := self._live.of_run(item.run)) is None:
                continue
            key, live = found
            touched[key] = None
            step = take_output(live, item.output, room_bytes=room_bytes)
            if step is not None:
                progress.append(step)
                room_bytes -= sum(len(payload) + SEALED_OVERHEAD_BYTES for payload in step.payloads)
            effects += self._take(item.run, live, step)
        try:
            if progress:
                self._store.append(progress)
        except CapacityError:
            self.tally.add("store_failures")
            for key in touched:
                effects += self._live.drop(key)
            return effects
        for key in touched:
            self._speaker.touch(key)
        return effects

    def poll(self, now_s: float, room_bytes: float = math.inf) -> list[GatewayEffect]:
        """Do whatever is due, and seal no more than fits into `room_bytes`."""
        if now_s >= self._expire_at_s:
            self._expire_at_s = now_s + _EXPIRE_EVERY_S
            self._expire()
        self._speaker.look(now_s)
        return self._speaker.say(now_s, room_bytes)

    def next_wakeup_s(self) -> float:
        """When `poll` next has something to do; in the past when only room was lacking."""
        return min(self._expire_at_s, self._speaker.next_wakeup_s())

    def _rotate(self) -> bool:
        """Make and erase prekeys as their time comes; False on a refusing disk, with the old."""
        try:
            self._keys.rotate()
        except CapacityError as error:
            self.tally.add("store_failures")
            logger.warning("%s", error)
            return False
        return True

    def _expire(self) -> None:
        if not self._rotate():
            # A prekey that should be gone still opens requests whose rows say that they have run.
            return
        try:
            self._store.expire(self._oldest_ms(), now_ms=int(self._wall_s() * 1000))
        except CapacityError:
            self.tally.add("store_failures")

    def _oldest_ms(self) -> int:
        """Ids older than this are refused, so their rows are not needed: no prekey opens them."""
        return int((self._wall_s() - VALID_FOR_S) * 1000)

    def _on_request(self, now_s: float, key: LiveKey, payload: bytes) -> list[GatewayEffect]:
        keys = self._keys.open(now_s, key.handle, payload)
        if keys is None:
            return []
        call = Call.decode(keys.body)
        newest_ms = (self._wall_s() + MAX_AHEAD_S) * 1000
        if not self._oldest_ms() <= request_time_ms(key.request_id) <= newest_ms:
            raise SealError
        self.tally.add("opened")
        live = self._live.find(key)
        if (refusal := self._keys.refusal(keys.device_id)) is not None:
            stop = self._live.drop(key) if live else []
            return [self._speaker.refuse(key, keys, refusal), *stop]
        if live is not None:
            return self._reattach(now_s, key, live, keys, call)
        row_key = RequestKey(keys.device_id, key.request_id)
        row = self._store.find(row_key)
        if row is None:
            return self._begin(now_s, key, row_key, keys, call)
        return self._take_up(now_s, key, row_key, row, keys, call)

    def _reattach(
        self, now_s: float, key: LiveKey, live: Live, keys: GatewayAttempt, call: Call
    ) -> list[GatewayEffect]:
        """A new attempt for a request that is running or being sent: never a second run."""
        if keys.attempt <= live.keys.attempt:
            self.tally.add("duplicates")
            return []
        self._store.use_attempt(live.row, keys.attempt)
        self.tally.add("resends")
        live.keys = keys
        self._speaker.touch(key)
        return self._attach(now_s, live, call)

    def _begin(
        self, now_s: float, key: LiveKey, row_key: RequestKey, keys: GatewayAttempt, call: Call
    ) -> list[GatewayEffect]:
        try:
            if self._live.full(key.handle):
                raise CapacityError("gateway: all places taken")
            expires_ms = int(self._wall_s() * 1000) + call.ttl_ms
            self._store.begin(row_key, keys.attempt, expires_ms=expires_ms)
        except CapacityError as error:
            return [self._speaker.refuse(key, keys, error.code)]
        return self._open_session(now_s, key, row_key, keys, call, stored=[], ended=None)

    def _take_up(
        self,
        now_s: float,
        key: LiveKey,
        row_key: RequestKey,
        row: GatewayRow,
        keys: GatewayAttempt,
        call: Call,
    ) -> list[GatewayEffect]:
        """A request from an earlier life of ours, or of its device."""
        if keys.attempt <= row.attempt:
            self.tally.add("duplicates")
            return []
        if row.closed:
            return [self._speaker.refuse(key, keys, row.code)]
        ended = None if row.status is Status.MORE else Finished(row.status, row.code)
        if self._live.full(key.handle):
            return [self._speaker.refuse(key, keys, CapacityError.code)]
        self._store.use_attempt(row_key, keys.attempt)
        self.tally.add("resends")
        try:
            stored = self._store.payloads(row_key)
        except LinkError as error:
            return [self._speaker.refuse(key, keys, error.code)]
        return self._open_session(now_s, key, row_key, keys, call, stored=stored, ended=ended)

    def _open_session(
        self,
        now_s: float,
        key: LiveKey,
        row_key: RequestKey,
        keys: GatewayAttempt,
        call: Call,
        *,
        stored: list[bytes],
        ended: Finished | None,
    ) -> list[GatewayEffect]:
        session = GatewaySession(timing=self._timing, now_s=now_s, stored=stored)
        if ended is not None:
            session.end(ended.status, ended.code)
        live = Live(
            row=row_key,
            keys=keys,
            session=session,
            answer_bytes=sum(map(len, stored)),
        )
        self._attach(now_s, live, call)
        self._live.add(key, live)
        request = InboundRequest(
            device_id=keys.device_id,
            handle=key.handle,
            request_id=keys.request_id,
            body=call.body,
            attempt=keys.attempt,
        )
        start: list[GatewayEffect] = []
        if ended is None and not session.diverged:
            start.append(Start(run=self._live.start_run(key), request=request))
        self._speaker.touch(key)
        return start

    def _attach(self, now_s: float, live: Live, call: Call) -> list[GatewayEffect]:
        """Serve this attempt; a device that has another answer than ours ends the run."""
        live.session.on_request(
            now_s,
            have=call.have,
            credit=call.credit,
            ttl_s=min(call.ttl_ms / 1000, VALID_FOR_S),
            proof=call.proof,
        )
        return [*self._live.end_run(live)] if live.session.diverged else []

    def _on_control(self, now_s: float, key: LiveKey, payload: bytes) -> list[GatewayEffect]:
        live = self._live.find(key)
        if live is None:
            raise SealError
        control = Control.decode(live.keys.open_control(payload))
        self.tally.add("opened")
        if (refusal := self._keys.refusal(live.keys.device_id)) is not None:
            return [self._speaker.refuse(key, live.keys, refusal), *self._live.drop(key)]
        match control.kind:
            case ControlKind.ACK:
                if live.session.on_ack(now_s, control):
                    self.tally.add("rewinds")
                self._speaker.touch(key)
                return []
            case ControlKind.DONE:
                live.session.on_done()
                code = "already_answered"
            case ControlKind.CANCEL:
                live.session.cancel()
                code = "cancelled"
                self.tally.add("cancelled")
        try:
            self._store.close_request(live.row, code)
        except CapacityError:
            # The row stays as it is until it is too old: its device asks no more.
            self.tally.add("store_failures")
        return [*self._live.drop(key)]

    def _take(self, run: RunId, live: Live, progress: Progress | None) -> list[GatewayEffect]:
        """Account for one output; its end frees the place."""
        if progress is None:
            return [Release(run, 1)]
        if progress.status is Status.MORE:
            return []
        self.tally.add("completed" if progress.status is Status.COMPLETE else "failed")
        return [*self._live.end_run(live)]
