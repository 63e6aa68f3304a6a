"""A client of a broker that hears everything on it, which is what a broker's owner can do, too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tidegate.link.mqtt import MqttTransport
from tidegate.link.transport import Connected, Message


@asynccontextmanager
async def eavesdropper(url: str) -> AsyncIterator[list[Message]]:
    """Everything that the broker shows to a subscriber of `#`."""
    transport = MqttTransport(url)
    transport.subscribe("#")
    heard: list[Message] = []
    listening = asyncio.Event()

    async def listen() -> None:
        async for event in transport.events():
            if isinstance(event, Message):
                heard.append(event)
            elif isinstance(event, Connected):
                listening.set()

    tasks = [asyncio.create_task(transport.run()), asyncio.create_task(listen())]
    try:
        await listening.wait()
        yield heard
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
