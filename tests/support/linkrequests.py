"""Requests as a gateway hands them to its handler, and what the handler answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable

from tidegate.api.backend import AnswerEvent
from tidegate.api.wire import read_event
from tidegate.cloud.handler import LinkHandler
from tidegate.link.effects import InboundRequest
from tidegate.link.envelope import DeviceId, RequestId

HANDLE = "ab" * 16


def body(words: str = "hello", **fields: object) -> dict[str, object]:
    """A chat of 24 tokens."""
    return {"messages": [{"role": "user", "content": words}], "max_tokens": 24, **fields}


def inbound(content: dict[str, object] | bytes, number: int = 1) -> InboundRequest:
    """The request with that number, of one device."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    name = RequestId(number.to_bytes(16))
    return InboundRequest(
        device_id=DeviceId(b"d" * 16), handle=HANDLE, request_id=name, body=raw, attempt=0
    )


async def payloads(handler: LinkHandler, request: InboundRequest) -> list[bytes]:
    """A whole answer."""
    async with asyncio.timeout(20):
        return [payload async for payload in handler(request)]


def events(found: Iterable[bytes]) -> list[AnswerEvent]:
    """What payloads say."""
    return [read_event(payload) for payload in found]
