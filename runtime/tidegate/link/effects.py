"""What a core asks its asyncio shell to do, in order, after everything durable is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NewType

from tidegate.link.device_states import State
from tidegate.link.envelope import DeviceId, RequestId

RunId = NewType("RunId", int)
"""One run of a gateway's handler. A request that is run again has another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Publish:
    """Hand a message to the transport; losing it is allowed."""

    topic: str
    payload: bytes = field(repr=False)
    retain: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivered:
    """Device: payloads `first`, `first + 1`, ... for the application."""

    request_id: RequestId
    first: int
    payloads: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """Device: the request is over."""

    request_id: RequestId
    state: State
    code: str


@dataclass(frozen=True, kw_only=True, slots=True)
class InboundRequest:
    """An opened request, as the handler gets it."""

    device_id: DeviceId
    handle: str
    """The name that the device is known by outside; lists and books have it."""
    request_id: RequestId
    body: bytes = field(repr=False)
    attempt: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Gateway: run the handler."""

    run: RunId
    request: InboundRequest


@dataclass(frozen=True, slots=True)
class Stop:
    """Gateway: cancel the handler if it still runs."""

    run: RunId


@dataclass(frozen=True, slots=True)
class Release:
    """Gateway: `count` payloads have left; the handler may produce as many more."""

    run: RunId
    count: int


@dataclass(frozen=True, slots=True)
class SomebodyCame:
    """Gateway: a device has connected, as the broker says; it may not know us yet."""


DeviceEffect = Publish | Delivered | Ended
GatewayEffect = Publish | Start | Stop | Release | SomebodyCame
