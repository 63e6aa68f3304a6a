"""Both ends of the link in one process, over the in-memory broker, with any handler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linklab import FAST

from tidegate.api.backend import AnswerEvent, Routed
from tidegate.api.wire import write_event
from tidegate.engine.events import Failed, Finished, TextDelta, Timing, Usage
from tidegate.link.device import DeviceLink
from tidegate.link.effects import InboundRequest
from tidegate.link.fleet import pair
from tidegate.link.gateway import Gateway, Handler
from tidegate.link.memory import MemoryBroker, MemoryTransport
from tidegate.link.prekeys import ModelOffer
from tidegate.link.suites import PREFERENCE
from tidegate.link.timing import Timing as LinkTiming

HERE = Routed(route="cloud", reason="asked here", model="big", request_id="at-the-cloud")


def said(text: str, token: int = 7) -> TextDelta:
    return TextDelta(text=text, tokens=(token,))


def finished(tokens: int = 2) -> Finished:
    """The end of an answer, with times as the cloud saw them."""
    return Finished(
        reason="stop",
        usage=Usage(prompt_tokens=3, completion_tokens=tokens),
        timing=Timing(first_scheduled_s=500.0, first_token_s=1000.0, total_s=2000.0, decode_s=0.5),
    )


def failed(code: str, message: str, *, retryable: bool = False) -> Failed:
    return Failed(code=code, message=message, retryable=retryable)


@dataclass
class ScriptedCloud:
    """A gateway's handler that answers every request with the same events.

    None in the script waits for ever, bytes go out as they are. `bodies` are the requests it got,
    `closed` counts the answers that were given up.
    """

    script: tuple[AnswerEvent | bytes | None, ...]
    bodies: list[bytes] = field(default_factory=list)
    closed: int = 0

    async def __call__(self, request: InboundRequest) -> AsyncIterator[bytes]:
        self.bodies.append(request.body)
        try:
            for event in self.script:
                if event is None:
                    await asyncio.Event().wait()
                elif isinstance(event, bytes):
                    yield event
                else:
                    yield write_event(event)
        except asyncio.CancelledError:
            self.closed += 1
            raise


@dataclass(frozen=True, kw_only=True)
class LinkPair:
    """A device's link and the broker, which holds every message that was published."""

    device: DeviceLink
    broker: MemoryBroker

    @property
    def requests(self) -> int:
        """Messages from the device to the gateway."""
        return sum("/q/" in message.topic for message in self.broker.seen)


@asynccontextmanager
async def linked(
    folder: Path,
    handler: Handler,
    *,
    context_tokens: int = 512,
    others: tuple[ModelOffer, ...] = (),
    timing: LinkTiming = FAST,
    device_suites: Sequence[int] = PREFERENCE,
    gateway_suites: Sequence[int] = PREFERENCE,
) -> AsyncIterator[LinkPair]:
    """Run both ends around a block that begins when the device has heard from the gateway."""
    pair(folder / "device", folder / "gateway")
    broker = MemoryBroker()
    device = DeviceLink(
        folder / "device", MemoryTransport(broker), timing=timing, suites=device_suites
    )
    offer = ModelOffer(id="big", context_tokens=context_tokens)
    gateway = Gateway(
        folder / "gateway",
        MemoryTransport(broker),
        handler,
        models=lambda: (offer, *others),
        timing=timing,
        suites=gateway_suites,
    )
    running = [asyncio.create_task(gateway.run()), asyncio.create_task(device.run())]
    try:
        async with asyncio.timeout(10):
            while not await device.gateways():
                await asyncio.sleep(0.005)
        yield LinkPair(device=device, broker=broker)
    finally:
        for task in running:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await gateway.close()
        await device.close()


async def until(condition: Callable[[], bool]) -> None:
    """Poll until `condition` holds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def going(part: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """`part` runs meanwhile; it ends by cancellation."""
    task = asyncio.create_task(part)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
