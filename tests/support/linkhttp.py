"""A gateway's HTTP path on a loopback port, and both ends over it, over a broker, or over both."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from linklab import FAST

from tidegate.api.server import BoundServer
from tidegate.cloud.link_http import LinkHttp, LinkHttpTiming
from tidegate.link.broker_tls import TlsFiles
from tidegate.link.device import DeviceLink
from tidegate.link.device_paths import DevicePaths
from tidegate.link.effects import InboundRequest
from tidegate.link.gateway import Gateway, Handler
from tidegate.link.gateway_paths import GatewayPaths
from tidegate.link.http_device import HttpTransport
from tidegate.link.http_door import HttpDoor
from tidegate.link.http_hub import HttpHub
from tidegate.link.http_stream import HubLimits
from tidegate.link.identity import load_device
from tidegate.link.memory import Faults, MemoryBroker, MemoryTransport
from tidegate.link.path_choice import PathTiming
from tidegate.link.prekeys import ModelOffer

QUICK = PathTiming(patience_s=0.2, steady_s=0.2, linger_s=0.1, fresh_s=60.0)
SOON = LinkHttpTiming(beat_s=0.2, body_s=1.0, write_s=1.0, recheck_s=0.1)
OFFER = ModelOffer(id="big", context_tokens=512)
TOKENS = 60


async def tokens(request: InboundRequest) -> AsyncIterator[bytes]:
    """Sixty payloads, the same at every run, slow enough to be interrupted."""
    for number in range(TOKENS):
        yield request.body + b" %d" % number
        await asyncio.sleep(0.01)


def whole(body: bytes) -> list[bytes]:
    """What `tokens` answers."""
    return [body + b" %d" % number for number in range(TOKENS)]


@dataclass(frozen=True, kw_only=True)
class HttpSide:
    """A hub, its app, and the server in front of them."""

    hub: HttpHub
    app: LinkHttp
    server: BoundServer

    @property
    def url(self) -> str:
        return self.server.url


@asynccontextmanager
async def http_side(
    gateway: Path,
    *,
    port: int = 0,
    tls: ssl.SSLContext | None = None,
    limits: HubLimits | None = None,
    timing: LinkHttpTiming = SOON,
) -> AsyncIterator[HttpSide]:
    """A hub whose `run` is the caller's, like a transport's."""
    door = HttpDoor(gateway)
    hub = HttpHub(door.group, door.gateway_id, limits=limits)
    app = LinkHttp(door, hub, timing=timing)
    server = BoundServer(app, "127.0.0.1", port, drain_s=1, tls=tls)
    hub.serve_with(server.run)
    try:
        yield HttpSide(hub=hub, app=app, server=server)
    finally:
        server.close()
        await app.close()


@dataclass(frozen=True, kw_only=True)
class BothWays:
    """Both ends on two paths."""

    device: DeviceLink
    gateway: Gateway
    broker: MemoryBroker
    paths: DevicePaths
    side: HttpSide


@asynccontextmanager
async def both_ways(
    folder: Path,
    handler: Handler = tokens,
    *,
    timing: PathTiming = QUICK,
    device_broker: MemoryBroker | None = None,
    faults: Faults | None = None,
) -> AsyncIterator[BothWays]:
    """A device and a gateway of `fleet.pair` in `folder`, on a broker in memory and on HTTP.

    The device is on `device_broker`, where that is another one. The broker has `faults`.
    """
    broker = MemoryBroker(faults=faults)
    async with http_side(folder / "gateway") as side:
        link = replace(FAST, connect_timeout_s=10.0)
        ways = GatewayPaths(MemoryTransport(broker), side.hub)
        gateway = Gateway(folder / "gateway", ways, handler, models=lambda: (OFFER,), timing=link)
        paths = DevicePaths(
            MemoryTransport(device_broker or broker),
            http_of(side.url, folder / "device"),
            timing=timing,
        )
        device = DeviceLink(folder / "device", paths, timing=link)
        async with running(gateway.run, device.run):
            yield BothWays(device=device, gateway=gateway, broker=broker, paths=paths, side=side)
        await gateway.close()
        await device.close()


def http_of(url: str, device: Path, files: TlsFiles | None = None) -> HttpTransport:
    """A device's transport to one gateway."""
    return HttpTransport([url], partial(load_device, device), files=files)


@asynccontextmanager
async def running(*parts: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run parts around a block; one that fails fails the block."""
    tasks = [asyncio.create_task(part()) for part in parts]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], bool], what: str, *, within_s: float = 10.0) -> None:
    """Poll until `condition` holds."""
    try:
        async with asyncio.timeout(within_s):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {within_s:g} s: {what}") from None
