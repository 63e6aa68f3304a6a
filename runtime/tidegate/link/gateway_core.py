"""The gateway end without I/O of its own but its store: events and a clock in, effects out.

One core is used by one thread. `Start` is returned only after the request's row is on the disk,
and a chunk is published only after it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tidegate.errors import CapacityError, ConfigError, LinkError, SealError
from tidegate.link.counters import Tally
from tidegate.link.effects import (
    GatewayEffect,
    InboundRequest,
    Publish,
    Release,
    RunId,
    Start,
    Stop,
)
from tidegate.link.envelope import (
    GatewayAttempt,
    MessageType,
    RequestId,
    request_time_ms,
    route,
)
from tidegate.link.gateway_keys import GatewayKeys
from tidegate.link.gateway_session import DIVERGED, TERMINAL, GatewaySession, State
from tidegate.link.gateway_store import GatewayRow, GatewayStore, Progress, RequestKey
from tidegate.link.messages import (
    MAX_ANSWER_BYTES,
    MAX_PAYLOAD_BYTES,
    Bundle,
    Call,
    Control,
    ControlKind,
    Status,
)
from tidegate.link.prekeys import (
    CLOCK_SKEW_S,
    VALID_FOR_S,
    ModelOffer,
)
from tidegate.link.timing import Timing
from tidegate.link.topics import Topics, last_level

logger = logging.getLogger(__name__)
_EXPIRE_EVERY_S = 60.0
_WAITING_PER_PLACE = 4
"""Live requests, running or waiting to be fetched, per place to run one: bounds memory."""


@dataclass(frozen=True, slots=True)
class LiveKey:
    """How a live request is found before anything is decrypted."""

    handle: str
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Finished:
    """The handler ended; `code` names the error when it failed."""

    status: Status
    code: str = ""


@dataclass(frozen=True, slots=True)
class Produced:
    """One output of a handler: a payload, or how it ended."""

    run: RunId
    output: bytes | Finished = field(repr=False)


@dataclass(slots=True)
class _Live:
    """A request with a session. `row` is its name in the store."""

    row: RequestKey
    keys: GatewayAttempt = field(repr=False)
    session: GatewaySession
    answer_bytes: int
    run: RunId | None
    """None when no handler runs for it (any more)."""


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
        if max_requests < 1:
            raise ConfigError("link.max_requests", max_requests, "1 or more")
        self.tally = Tally()
        self._keys = keys
        self._topics = Topics(keys.identity.group)
        self._store = store
        self._timing = timing
        self._max_requests = max_requests
        self._wall_s = wall_s
        self._live: dict[LiveKey, _Live] = {}
        self._runs: dict[RunId, LiveKey] = {}
        self._last_run = 0
        self._expire_at_s = now_s

    @property
    def filters(self) -> tuple[str, ...]:
        """Topic filters to subscribe to."""
        return (self._topics.every_request(self._keys.identity.gateway_id),)

    @property
    def load(self) -> float:
        """Share of the allowed requests that are running, 0 to 1."""
        return len(self._runs) / self._max_requests

    def _full(self, handle: str) -> bool:
        """No place is left, or too many answers wait for devices that have gone quiet.

        One device gets half of the places at most, so that it cannot lock the others out.
        """
        share = max(1, self._max_requests // 2)
        its_own = [live for key, live in self._live.items() if key.handle == handle]
        return (
            len(self._runs) >= self._max_requests
            or len(self._live) >= self._max_requests * _WAITING_PER_PLACE
            or sum(live.run is not None for live in its_own) >= share
            or len(its_own) >= share * _WAITING_PER_PLACE
        )

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

    def receive(self, now_s: float, topic: str, payload: bytes) -> list[GatewayEffect]:
        """A message arrived. Never raises for anything a peer or a broker can send."""
        handle = last_level(topic)
        try:
            where = route(payload)
            key = LiveKey(handle, where.request_id)
            if where.kind is MessageType.REQUEST:
                return self._on_request(now_s, key, payload)
            if where.kind is MessageType.CONTROL:
                return self._on_control(now_s, key, payload)
            raise SealError
        except (SealError, ValueError):
            self.tally.add("dropped")
        except CapacityError:
            self.tally.add("store_failures")
        return []

    def produced(self, now_s: float, batch: Sequence[Produced]) -> list[GatewayEffect]:
        """What handlers yielded since the last call: stored in one transaction, then sent.

        When the disk refuses, the requests concerned are dropped and their devices ask again.
        """
        effects: list[GatewayEffect] = []
        progress: list[Progress] = []
        touched: dict[LiveKey, _Live] = {}
        for item in batch:
            key = self._runs.get(item.run)
            if key is not None:
                touched[key] = self._live[key]
                effects += self._take(item, touched[key], progress)
        try:
            if progress:
                self._store.append(progress)
        except CapacityError:
            self.tally.add("store_failures")
            for key in touched:
                effects += self._drop(key)
            return effects
        for key, live in touched.items():
            effects += self._poll(now_s, key, live)
        return effects

    def poll(self, now_s: float) -> list[GatewayEffect]:
        """Do whatever is due."""
        if now_s >= self._expire_at_s:
            self._expire_at_s = now_s + _EXPIRE_EVERY_S
            self._expire()
        effects: list[GatewayEffect] = []
        for key, live in list(self._live.items()):
            effects += self._poll(now_s, key, live)
        return effects

    def next_wakeup_s(self) -> float:
        """When `poll` next has something to do."""
        due = [live.session.next_wakeup_s() for live in self._live.values()]
        return min([self._expire_at_s, *due])

    def _rotate(self) -> None:
        """Make and erase prekeys as their time comes; on a refusing disk go on with the old."""
        try:
            self._keys.rotate()
        except CapacityError as error:
            self.tally.add("store_failures")
            logger.warning("%s", error)

    def _expire(self) -> None:
        self._rotate()
        try:
            self._store.expire(self._oldest_ms())
        except CapacityError:
            self.tally.add("store_failures")

    def _oldest_ms(self) -> int:
        """Ids older than this are refused, so their rows are not needed: no prekey opens them."""
        return int((self._wall_s() - VALID_FOR_S) * 1000)

    def _on_request(self, now_s: float, key: LiveKey, payload: bytes) -> list[GatewayEffect]:
        keys = self._keys.open(key.handle, payload)
        call = Call.decode(keys.body)
        newest_ms = (self._wall_s() + CLOCK_SKEW_S) * 1000
        if not self._oldest_ms() <= request_time_ms(key.request_id) <= newest_ms:
            raise SealError
        self.tally.add("opened")
        live = self._live.get(key)
        if live is not None:
            return self._reattach(now_s, key, live, keys, call)
        row_key = RequestKey(keys.device_id, key.request_id)
        row = self._store.find(row_key)
        if row is None:
            return self._begin(now_s, key, row_key, keys, call)
        return self._take_up(now_s, key, row_key, row, keys, call)

    def _reattach(
        self, now_s: float, key: LiveKey, live: _Live, keys: GatewayAttempt, call: Call
    ) -> list[GatewayEffect]:
        """A new attempt for a request that is running or being sent: never a second run."""
        if keys.attempt <= live.keys.attempt:
            self.tally.add("duplicates")
            return []
        self._store.use_attempt(live.row, keys.attempt)
        self.tally.add("resends")
        live.keys = keys
        stop = self._attach(now_s, live, call)
        return stop + self._poll(now_s, key, live)

    def _begin(
        self, now_s: float, key: LiveKey, row_key: RequestKey, keys: GatewayAttempt, call: Call
    ) -> list[GatewayEffect]:
        try:
            if self._full(key.handle):
                raise CapacityError("gateway: all places taken")
            self._store.begin(row_key, keys.attempt)
        except CapacityError as error:
            return self._refuse(key, keys, error.code)
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
            return self._refuse(key, keys, row.code)
        ended = None if row.status is Status.MORE else Finished(row.status, row.code)
        if self._full(key.handle):
            return self._refuse(key, keys, CapacityError.code)
        self._store.use_attempt(row_key, keys.attempt)
        self.tally.add("resends")
        try:
            stored = self._store.payloads(row_key)
        except LinkError as error:
            return self._refuse(key, keys, error.code)
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
        live = _Live(
            row=row_key,
            keys=keys,
            session=session,
            answer_bytes=sum(map(len, stored)),
            run=None,
        )
        self._attach(now_s, live, call)
        self._live[key] = live
        request = InboundRequest(
            device_id=keys.device_id,
            request_id=keys.request_id,
            body=call.body,
            attempt=keys.attempt,
        )
        start: list[GatewayEffect] = []
        if ended is None and not session.diverged:
            self._last_run += 1
            live.run = RunId(self._last_run)
            self._runs[live.run] = key
            start.append(Start(run=live.run, request=request))
        return start + self._poll(now_s, key, live)

    def _attach(self, now_s: float, live: _Live, call: Call) -> list[GatewayEffect]:
        """Serve this attempt; a device that has another answer than ours ends the run."""
        live.session.on_request(
            now_s,
            have=call.have,
            credit=call.credit,
            ttl_s=min(call.ttl_ms / 1000, VALID_FOR_S),
            proof=call.proof,
        )
        return self._end_run(live) if live.session.diverged else []

    def _refuse(self, key: LiveKey, keys: GatewayAttempt, code: str) -> list[GatewayEffect]:
        """Answer with an error and keep nothing: a later attempt may find room."""
        self.tally.add("refused")
        bundle = Bundle(first=0, status=Status.FAILED, code=code)
        message = keys.seal_response(bundle.encode(), final=True)
        return [self._publish(key, message)]

    def _on_control(self, now_s: float, key: LiveKey, payload: bytes) -> list[GatewayEffect]:
        live = self._live.get(key)
        if live is None:
            raise SealError
        control = Control.decode(live.keys.open_control(payload))
        self.tally.add("opened")
        match control.kind:
            case ControlKind.ACK:
                if live.session.on_ack(now_s, control):
                    self.tally.add("rewinds")
                return self._poll(now_s, key, live)
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
        return self._drop(key)

    def _take(self, item: Produced, live: _Live, progress: list[Progress]) -> list[GatewayEffect]:
        ending = item.output
        if isinstance(ending, bytes):
            failure = self._take_payload(ending, live, progress)
            if failure is None:
                return []
            if not failure:
                return [Release(item.run, 1)]
            ending = Finished(Status.FAILED, failure)
        status, code = live.session.finish(ending.status, ending.code)
        self.tally.add("completed" if status is Status.COMPLETE else "failed")
        first = len(live.session.payloads)
        progress.append(Progress(key=live.row, first=first, payloads=(), status=status, code=code))
        return self._end_run(live)

    def _take_payload(self, payload: bytes, live: _Live, progress: list[Progress]) -> str | None:
        """None when it is a new payload, "" when it is a repetition, or why the answer fails."""
        session = live.session
        if not session.repeating:
            live.answer_bytes += len(payload)
            if len(payload) > MAX_PAYLOAD_BYTES or live.answer_bytes > MAX_ANSWER_BYTES:
                return "answer_too_large"
        number = session.produce(payload)
        if session.diverged:
            return DIVERGED
        if number is None:
            return ""
        progress.append(Progress(key=live.row, first=number, payloads=(payload,)))
        return None

    def _poll(self, now_s: float, key: LiveKey, live: _Live) -> list[GatewayEffect]:
        effects: list[GatewayEffect] = []
        for bundle in live.session.poll(now_s):
            final = bundle.status is not Status.MORE
            message = live.keys.seal_response(bundle.encode(), final=final)
            effects.append(self._publish(key, message))
        released = live.session.take_released()
        if released and live.run is not None:
            effects.append(Release(live.run, released))
        if live.session.state is State.PARKED:
            self.tally.add("expired")
        if live.session.state in TERMINAL:
            effects += self._drop(key)
        return effects

    def _drop(self, key: LiveKey) -> list[GatewayEffect]:
        return self._end_run(self._live.pop(key))

    def _end_run(self, live: _Live) -> list[GatewayEffect]:
        if live.run is None:
            return []
        run, live.run = live.run, None
        del self._runs[run]
        return [Stop(run)]

    def _publish(self, key: LiveKey, message: bytes) -> Publish:
        self.tally.add("sent")
        return Publish(topic=self._topics.response(key.handle), payload=message)
