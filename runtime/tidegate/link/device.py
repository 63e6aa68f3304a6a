"""`DeviceLink`: the asyncio end of a device. Give it a body, iterate over the answer.

The core decides, in its own thread; this file moves messages and payloads. `run` ends by
cancellation; what was not finished is in the outbox and goes on at the next start.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tidegate.errors import (
    LinkError,
    RequestError,
    TidegateError,
)
from tidegate.link.core_thread import CoreThread
from tidegate.link.counters import LinkCounters
from tidegate.link.device_core import DeviceCore
from tidegate.link.device_reader import NothingHeardError, Reader
from tidegate.link.device_states import State
from tidegate.link.device_views import GatewayView, PendingRequest
from tidegate.link.effects import Delivered, DeviceEffect, Ended, Publish
from tidegate.link.envelope import RequestId, new_request_id
from tidegate.link.failures import LINK_STOPPED, error_of
from tidegate.link.gateway_revocation import REVOKED_FILE, RevokedGateways
from tidegate.link.identity import load_device
from tidegate.link.inbox import Inbox
from tidegate.link.keyfiles import FolderLock
from tidegate.link.outbox import IDEMPOTENCY_KEY, NORMAL_PRIORITY, Name, Outbox, Outcome
from tidegate.link.sending import DRAIN_S, Outgoing
from tidegate.link.suites import PREFERENCE
from tidegate.link.timing import Timing
from tidegate.link.transport import (
    Connected,
    Disconnected,
    Message,
    Transport,
    TransportEvent,
)

logger = logging.getLogger(__name__)
_BEING_READ = "the answer to this request is being read already"
_GRACE_S = 5.0
"""The core ends a request at its deadline; a caller waits this much longer for it to say so."""


class Submit(Protocol):
    """`DeviceCore.submit` of a request that lacks its id."""

    def __call__(self, now_s: float, /, *, request_id: RequestId) -> None: ...


class DeviceLink:
    """A device's link to its gateways.

    Args:
        directory: what `fleet.add_device` made; the outbox lives there too.
        transport: how to reach the broker.
        timing: waits and windows.
        suites: those that may be used, preferred ones first; a gateway without one is not asked.

    Raises:
        ConfigError: `suites` cannot be used.
        IdentityError, LinkError: the directory's keys or outbox cannot be used, or another process
            is using them.
    """

    def __init__(
        self,
        directory: Path,
        transport: Transport,
        *,
        timing: Timing | None = None,
        suites: Sequence[int] = PREFERENCE,
    ) -> None:
        self._transport = transport
        self._timing = timing or Timing()
        with ExitStack() as undo:
            identity = load_device(directory)
            self._lock = FolderLock(directory)
            undo.callback(self._lock.release)
            self._outbox = Outbox.open(directory / "outbox.sqlite")
            undo.callback(self._outbox.close)
            self._core = DeviceCore(
                identity=identity,
                outbox=self._outbox,
                timing=self._timing,
                rng=random.Random(),
                wall_s=time.time,
                now_s=time.monotonic(),
                suites=suites,
                revoked=RevokedGateways(identity.root, identity.group, directory / REVOKED_FILE),
            )
            undo.pop_all()
        self._thread = CoreThread("tidegate-device")
        self._inbox = Inbox()
        self._outgoing = Outgoing(transport, self._core.tally, on_room=self._inbox.ring)
        self._readers: dict[RequestId, Reader] = {}
        self._running = False

    @property
    def connected(self) -> bool:
        """The broker answers. Says nothing about gateways: see `gateways`."""
        return self._transport.connected

    @property
    def status(self) -> str:
        """One line for people: the broker and what is wrong with it, without secrets."""
        return self._transport.status

    @property
    def path(self) -> str:
        """What carries messages now: `mqtt`, `http`, or empty when nothing does."""
        return self._transport.path

    @property
    def counters(self) -> LinkCounters:
        return self._core.tally.snapshot(self._transport.traffic)

    async def gateways(self) -> tuple[GatewayView, ...]:
        """Gateways whose advert is valid now, the least loaded first."""
        now_s = time.time()
        adverts = await self._thread.call_now(self._core.gateways)
        return tuple(GatewayView.of(advert, now_s) for advert in adverts)

    async def run(self) -> None:
        """Send, receive and resend until cancelled; what is ready by then is still sent."""
        for topic_filter in self._core.filters:
            self._transport.subscribe(topic_filter)
        self._running = True
        try:
            async with asyncio.TaskGroup() as carrying:
                carrying.create_task(self._transport.run())
                carrying.create_task(self._outgoing.run())
                try:
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(self._receive())
                        tasks.create_task(self._take_turns())
                finally:
                    await self._outgoing.drain(DRAIN_S)
        finally:
            self._running = False
            for request_id in self._readers:
                self._apply([Ended(request_id=request_id, state=State.FAILED, code=LINK_STOPPED)])

    def request(
        self,
        body: bytes,
        *,
        deadline_s: float,
        request_id: RequestId | None = None,
        model: str | None = None,
        priority: int = NORMAL_PRIORITY,
        name: Name | None = None,
        gateway: str | None = None,
        heard: Callable[[], None] | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """Send `body` and yield the answer's payloads: in order, each once, to the last.

        Closing the iterator early (`contextlib.aclosing`) cancels the request at the gateway. A
        `request_id` that is in the outbox already is taken up again instead of sent twice, and
        its payloads come from the first on; a caller who waits for it in vain leaves it there.

        Args:
            body: opaque, at most `limits.MAX_REQUEST_BODY_BYTES`.
            deadline_s: from now, in seconds; a request from the outbox keeps the one it has.
            request_id: from `envelope.new_request_id`, for one request only; made here by default.
            model: only a gateway that advertises this model will do.
            priority: of those that wait the lowest goes first.
            name: takes up the request that was sent under it and whose answer nobody has read,
                unless that failed; otherwise it names this one.
            gateway: the only one to ask, as long as this process lives; by default any.
            heard: called when payloads arrive, which is before they are read; must be quick.

        Raises:
            RequestError: see `limits.check_request`; or `name` is another request's (422), or one
                whose answer is being read (409).
            CapacityError: the outbox or the gateway is full.
            UnavailableError: no gateway in time, or no whole answer before the deadline.
            ExecutionError: the gateway could not answer.
            LinkError: someone else reads this request's answer, or it makes no sense.
        """
        submit = partial(
            self._core.submit,
            body=body,
            deadline_s=deadline_s,
            model=model,
            priority=priority,
            name=name,
            gateway=gateway,
        )
        return self._answer(submit, request_id, name, deadline_s, heard)

    async def _answer(
        self,
        submit: Submit,
        request_id: RequestId | None,
        name: Name | None,
        deadline_s: float,
        heard: Callable[[], None] | None,
    ) -> AsyncGenerator[bytes, None]:
        """What `request` gives."""
        request_id = await self._claim(request_id, name)
        reader = self._readers[request_id] = Reader(heard)
        ended: Ended | None = None
        leave = False
        try:
            left_s = await self._open(reader, request_id, submit)
            while ended is None:
                output = await self._next(reader, deadline_s if left_s is None else left_s)
                if isinstance(output, Delivered):
                    for payload in reader.fresh(output):
                        yield payload
                else:
                    ended = output
        except NothingHeardError:
            leave = left_s is not None
            raise
        finally:
            del self._readers[request_id]
            if ended is None and self._running and not leave:
                self._apply(await self._thread.call_now(self._core.cancel, request_id))
        if ended.code != LINK_STOPPED:
            await self._thread.call(self._core.release, request_id)
        if ended.state is not State.DONE:
            raise self._error(ended.code)

    async def _claim(self, request_id: RequestId | None, name: Name | None) -> RequestId:
        """The id to go by: of the request that has this name, the caller's, or a new one.

        Raises:
            RequestError, LinkError: someone is reading its answer; see `request`.
        """
        if name is not None:
            request_id = await self._named(name) or request_id
        request_id = request_id or new_request_id(time.time_ns() // 1_000_000)
        if request_id in self._readers and name is not None:
            raise RequestError(IDEMPOTENCY_KEY, _BEING_READ, status=409)
        if request_id in self._readers:
            raise LinkError(f"request {request_id.hex()}: someone is reading its answer already")
        return request_id

    async def holds(self, name: Name) -> bool:
        """An answer is on its way, or here and unread, for the request that has this name.

        Raises:
            RequestError: see `request`.
        """
        return await self._named(name) is not None

    async def _named(self, name: Name) -> RequestId | None:
        row = await self._thread.call(self._core.named, name.key)
        if row is None:
            return None
        if row.digest != name.digest:
            raise RequestError(IDEMPOTENCY_KEY, "was used for another request", status=422)
        if row.request_id in self._readers:
            raise RequestError(IDEMPOTENCY_KEY, _BEING_READ, status=409)
        if row.outcome is Outcome.FAILED:
            await self._thread.call(self._core.release, row.request_id)
            return None
        return row.request_id

    async def pending(self) -> tuple[PendingRequest, ...]:
        """Every request in the outbox, oldest first: running, or finished and not read."""
        now_ms = time.time_ns() // 1_000_000
        return tuple(
            PendingRequest.of(held, now_ms, is_read=held.request_id in self._readers)
            for held in await self._thread.call(self._core.stored)
        )

    async def peek(self, request_id: RequestId) -> list[bytes]:
        """What there is of an answer, which stays.

        Raises:
            LinkError: no such request.
        """
        known = await self._thread.call(self._core.standing, request_id)
        if known is None:
            raise LinkError(f"request {request_id.hex()}: is not in the outbox")
        return known.payloads

    async def discard(self, request_id: RequestId) -> None:
        """Forget an answer; a request that still runs is cancelled."""
        self._apply(await self._thread.call_now(self._core.cancel, request_id))

    async def take(self, request_id: RequestId) -> list[bytes]:
        """The whole answer of a finished request, which is then forgotten.

        Raises:
            LinkError: no such request, or it is not finished.
            TidegateError: it failed; as `request` would have raised.
        """
        known = await self._thread.call(self._core.standing, request_id)
        if known is None or known.outcome is Outcome.OPEN:
            raise LinkError(f"request {request_id.hex()}: has no whole answer to take")
        await self._thread.call(self._core.release, request_id)
        if known.outcome is Outcome.FAILED:
            raise self._error(known.code)
        return known.payloads

    async def use_key(self, key: Ed25519PrivateKey) -> None:
        """Sign requests with this key of the device from their next attempt on."""
        await self._thread.call(self._core.use_key, key)

    async def close(self) -> None:
        """Close the outbox. Call it after `run` has ended."""
        await self._thread.call(self._outbox.close)
        self._thread.close()
        self._lock.release()

    async def _open(self, reader: Reader, request_id: RequestId, submit: Submit) -> float | None:
        """Submit it, or take it up; returns how long one that is taken up still has."""
        known = await self._thread.call(self._core.standing, request_id)
        if known is None:
            await self._thread.call_now(submit, request_id=request_id)
            self._inbox.ring()
            return None
        reader.start_with(known)
        if known.outcome is not Outcome.OPEN:
            state = State.DONE if known.outcome is Outcome.DONE else State.FAILED
            reader.queue.put_nowait(Ended(request_id=request_id, state=state, code=known.code))
        self._inbox.ring()
        left_s = await self._thread.call_now(self._core.remaining_s, request_id)
        return 0.0 if left_s is None else left_s

    async def _next(self, reader: Reader, deadline_s: float) -> Delivered | Ended:
        try:
            async with asyncio.timeout(deadline_s + _GRACE_S):
                return await reader.queue.get()
        except TimeoutError:
            raise NothingHeardError("the link is not running: start DeviceLink.run()") from None

    def _error(self, code: str) -> TidegateError:
        """The exception for a failure's stable name."""
        rejected, why = self.counters.adverts_rejected, self._core.advert_problem
        hint = f"; {rejected} adverts rejected, the last one: {why}" if rejected else ""
        return error_of(
            code,
            transport=self._transport.status,
            hint=hint,
            waited_s=self._timing.connect_timeout_s,
        )

    async def _receive(self) -> None:
        async for event in self._transport.events():
            match event:
                case Message():
                    pass
                case Connected():
                    logger.info("connected: %s", self._transport.status)
                case Disconnected():
                    logger.warning("disconnected: %s", self._transport.status)
            await self._inbox.put(event)

    async def _take_turns(self) -> None:
        """Give the core a turn whenever there is something for it."""
        while True:
            events = self._inbox.take()
            may_send = self._outgoing.room_bytes > 0
            effects, wake_at_s = await self._thread.call_now(self._turn, events, may_send)
            self._apply(effects)
            await self._inbox.wait(wake_at_s - time.monotonic())

    def _turn(
        self, now_s: float, events: list[TransportEvent], may_send: bool
    ) -> tuple[list[DeviceEffect], float]:
        effects = self._core.turn(now_s, events, may_send=may_send)
        return effects, self._core.next_wakeup_s()

    def _apply(self, effects: list[DeviceEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Publish):
                self._outgoing.put(effect)
            elif (reader := self._readers.get(effect.request_id)) is not None:
                reader.put(effect)
