"""`Gateway`: the asyncio end in the cloud. Give it a handler, it answers devices.

The core decides, in its own thread; this file gives it its turns, moves messages and runs one task
per request. Outputs of all handlers are collected until shortly before the beat, stored in one
transaction and sealed into as few messages as fit.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import ExitStack, aclosing
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tidegate.errors import CapacityError, ExecutionError, TidegateError
from tidegate.link.core_thread import CoreThread
from tidegate.link.counters import LinkCounters
from tidegate.link.effects import (
    GatewayEffect,
    InboundRequest,
    Publish,
    Release,
    RunId,
    SomebodyCame,
    Start,
    Stop,
)
from tidegate.link.gateway_adverts import AdvertTimes
from tidegate.link.gateway_core import GatewayCore
from tidegate.link.gateway_keys import GatewayKeys
from tidegate.link.gateway_output import Finished, Outputs, Produced
from tidegate.link.gateway_revocation import REVOKED_FILE, RevokedGateways
from tidegate.link.gateway_store import GatewayStore
from tidegate.link.identity import ROOT_FILE, load_gateway, read_root
from tidegate.link.inbox import Inbox
from tidegate.link.keyfiles import FolderLock
from tidegate.link.messages import Status
from tidegate.link.prekeys import ModelOffer, PrekeyStore
from tidegate.link.registry import DeviceRegistry
from tidegate.link.sending import DRAIN_S, Outgoing
from tidegate.link.suites import PREFERENCE
from tidegate.link.timing import Timing
from tidegate.link.transport import Connected, Disconnected, Message, Transport

logger = logging.getLogger(__name__)
Handler = Callable[[InboundRequest], AsyncIterator[bytes]]
"""Yields the answer's payloads. The n-th payload of a request must be the same bytes every time
it runs (greedy or seeded sampling, one payload per token), because a restarted gateway runs an
unfinished request again, compares what it had stored and goes on after it. A difference fails the
request with `answer_diverged`; only the answer's very last payload may carry, say, times."""

UNSENT_PAYLOADS = 256
"""How far a handler may run ahead of the device's credit window."""


class Gateway:
    """A gateway: opens requests, runs `handler`, seals answers.

    Args:
        directory: what `fleet.add_gateway` made; prekeys, registry and store live there too.
        transport: how to reach the broker.
        handler: see `Handler`. A `TidegateError` it raises reaches the device as its `code`; any
            other exception as `execution_failed`. It is cancelled when the device cancels or is
            gone.
        models: for the advert, asked for at every advert.
        load: 0 to 1 for the advert; by default the share of `max_requests` that run.
        max_requests: more are refused with `over_capacity`.
        suites: those that prekeys are made for, and requests are opened of.
        http: the URL, for the advert, at which devices find it over HTTP.

    Raises:
        IdentityError, LinkError: the directory's keys or store cannot be used, or another process
            is using them.
        ConfigError: a setting is out of range.
    """

    def __init__(
        self,
        directory: Path,
        transport: Transport,
        handler: Handler,
        *,
        models: Callable[[], Sequence[ModelOffer]] = tuple,
        load: Callable[[], float] | None = None,
        max_requests: int = 64,
        timing: Timing | None = None,
        suites: Sequence[int] = PREFERENCE,
        http: str = "",
    ) -> None:
        self._transport = transport
        self._handler = handler
        self._models = models
        self._load = load
        self._timing = timing or Timing()
        with ExitStack() as undo:
            identity = load_gateway(directory)
            self._lock = FolderLock(directory)
            undo.callback(self._lock.release)
            self._registry = DeviceRegistry(directory / "devices.sqlite")
            undo.callback(self._registry.close)
            self._store = GatewayStore.open(directory / "requests.sqlite")
            undo.callback(self._store.close)
            self._core = GatewayCore(
                keys=GatewayKeys(
                    identity=identity,
                    prekeys=PrekeyStore(directory / "prekeys.json", suites=suites),
                    registry=self._registry,
                    wall_s=time.time,
                    revoked=_revoked(directory, identity.group),
                    http=http,
                ),
                store=self._store,
                timing=self._timing,
                max_requests=max_requests,
                wall_s=time.time,
                now_s=time.monotonic(),
            )
            undo.pop_all()
        self._thread = CoreThread("tidegate-gateway")
        self._inbox = Inbox()
        self._outgoing = Outgoing(transport, self._core.tally, on_room=self._inbox.ring)
        self._outputs = Outputs(self._timing)
        self._adverts = AdvertTimes(self._timing, random.Random())
        self._advert_sooner = asyncio.Event()
        self._handlers: dict[RunId, asyncio.Task[None]] = {}
        self._room: dict[RunId, asyncio.Semaphore] = {}

    @property
    def connected(self) -> bool:
        """The broker answers."""
        return self._transport.connected

    @property
    def status(self) -> str:
        """One line for people: the broker and what is wrong with it, without secrets."""
        return self._transport.status

    @property
    def path(self) -> str:
        """What devices can come on now: `mqtt`, `http`, `mqtt+http`, or empty."""
        return self._transport.path

    @property
    def counters(self) -> LinkCounters:
        return self._core.tally.snapshot(self._transport.traffic)

    async def run(self) -> None:
        """Serve until cancelled; what is ready by then is still sent."""
        for topic_filter in self._core.filters:
            self._transport.subscribe(topic_filter)
        async with asyncio.TaskGroup() as carrying:
            carrying.create_task(self._transport.run())
            carrying.create_task(self._outgoing.run())
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._receive())
                    tasks.create_task(self._take_turns(tasks))
                    tasks.create_task(self._advertise())
            finally:
                await self._outgoing.drain(DRAIN_S)

    async def close(self) -> None:
        """Close the store. Call it after `run` has ended."""
        await self._thread.call(self._store.close)
        await self._thread.call(self._registry.close)
        self._thread.close()
        self._lock.release()

    async def _receive(self) -> None:
        async for event in self._transport.events():
            match event:
                case Message():
                    pass
                case Connected():
                    logger.info("connected: %s", self._transport.status)
                    self._adverts.connected(time.monotonic())
                    self._advert_sooner.set()
                case Disconnected():
                    logger.warning("disconnected: %s", self._transport.status)
            await self._inbox.put(event)

    async def _take_turns(self, tasks: asyncio.TaskGroup) -> None:
        """Give the core a turn whenever there is something for it."""
        wake_at_s, blocked = -math.inf, False
        while True:
            messages = [event for event in self._inbox.take() if isinstance(event, Message)]
            room_bytes = self._outgoing.room_bytes if self._transport.connected else 0
            now_s = time.monotonic()
            batch = self._outputs.take(now_s) if room_bytes > 0 else []
            if messages or batch or now_s >= wake_at_s or (blocked and room_bytes > 0):
                blocked = room_bytes <= 0
                effects, wake_at_s = await self._thread.call_now(
                    self._turn, messages, batch, room_bytes
                )
                self._apply(effects, tasks)
            elif room_bytes > 0:
                await self._inbox.wait(min(wake_at_s, self._outputs.due_s) - now_s)
            else:
                await self._inbox.wait(wake_at_s - now_s)

    def _turn(
        self, now_s: float, messages: list[Message], batch: list[Produced], room_bytes: float
    ) -> tuple[list[GatewayEffect], float]:
        effects = self._core.turn(now_s, messages, batch, room_bytes=room_bytes)
        return effects, self._core.next_wakeup_s()

    async def _advertise(self) -> None:
        while True:
            now_s = time.monotonic()
            if self._adverts.next_s > now_s:
                await _wait(self._advert_sooner, self._adverts.next_s - now_s)
                self._advert_sooner.clear()
                continue
            if self._transport.connected:
                load = None if self._load is None else self._load()
                try:
                    advert = await self._thread.call(self._core.advert, tuple(self._models()), load)
                except CapacityError as error:
                    logger.warning("no advert sent: %s", error)
                else:
                    self._outgoing.put(advert)
            self._adverts.sent(time.monotonic())

    def _apply(self, effects: list[GatewayEffect], tasks: asyncio.TaskGroup) -> None:
        for effect in effects:
            match effect:
                case Publish():
                    self._outgoing.put(effect)
                case SomebodyCame():
                    self._adverts.somebody_came(time.monotonic())
                    self._advert_sooner.set()
                case Start(run=run, request=request):
                    self._room[run] = asyncio.Semaphore(UNSENT_PAYLOADS)
                    self._handlers[run] = tasks.create_task(self._handle(run, request))
                case Release(run, count):
                    if (room := self._room.get(run)) is not None:
                        for _ in range(count):
                            room.release()
                case Stop(run):
                    self._room.pop(run, None)
                    if (task := self._handlers.pop(run, None)) is not None:
                        task.cancel()

    async def _handle(self, run: RunId, request: InboundRequest) -> None:
        """Run the handler; a request that fails never takes another one with it."""
        room = self._room[run]
        ending = Finished(Status.COMPLETE)
        try:
            async with aclosing(_as_generator(self._handler(request))) as payloads:
                async for payload in payloads:
                    await room.acquire()
                    self._put(run, payload)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Something inside the handler was cancelled, not the handler itself.
            ending = Finished(Status.FAILED, ExecutionError.code)
        except TidegateError as error:
            logger.warning("request failed: %s", error.code)
            ending = Finished(Status.FAILED, error.code)
        except Exception as error:
            # Neither its text nor its traceback is logged: both may quote the prompt.
            logger.error("request failed: the handler raised %s", type(error).__name__)
            ending = Finished(Status.FAILED, ExecutionError.code)
        self._put(run, ending)

    def _put(self, run: RunId, output: bytes | Finished) -> None:
        if self._outputs.put(time.monotonic(), Produced(run, output)):
            self._inbox.ring()


def _revoked(directory: Path, group: str) -> RevokedGateways | None:
    """The list of revoked gateways in the folder, for adverts; a folder of old pins no root."""
    if not (directory / ROOT_FILE).exists():
        return None
    root = Ed25519PublicKey.from_public_bytes(read_root(directory))
    return RevokedGateways(root, group, directory / REVOKED_FILE)


async def _as_generator(source: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """`source`, closed with us when it can be closed."""
    try:
        async for item in source:
            yield item
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s if timeout_s < math.inf else None):
            await event.wait()
    except TimeoutError:
        return
