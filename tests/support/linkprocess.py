"""One end of the link as a process of its own, to be killed: `python linkprocess.py ROLE DIR URL`.

A gateway answers every request with `answer()`; a device asks once, or takes up what its outbox
holds, and prints one line per payload and at the end how often it had to ask again.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from linklab import FAST

from tidegate.link.device import DeviceLink
from tidegate.link.effects import InboundRequest
from tidegate.link.gateway import Gateway
from tidegate.link.mqtt import MqttTransport

PAYLOADS = 120


def expected() -> list[str]:
    """The lines a device prints for a whole answer."""
    return [f"payload {i}" for i in range(PAYLOADS)]


async def answer(request: InboundRequest) -> AsyncIterator[bytes]:
    for line in expected():
        yield line.encode()
        await asyncio.sleep(0.01)


async def serve(directory: Path, url: str) -> None:
    await Gateway(directory, MqttTransport(url), answer, timing=FAST).run()


async def ask(directory: Path, url: str) -> None:
    device = DeviceLink(directory, MqttTransport(url), timing=FAST)
    running = asyncio.create_task(device.run())
    while not await device.gateways():  # its advert may be lost, or be late
        await asyncio.sleep(0.05)
    pending = await device.pending()
    request_id = pending[0].request_id if pending else None
    async for payload in device.request(b"prompt", deadline_s=60.0, request_id=request_id):
        print(payload.decode(), flush=True)
    print(f"resends {device.counters.resends}", flush=True)
    running.cancel()
    await asyncio.wait([running])
    await device.close()


if __name__ == "__main__":
    role, directory, url = sys.argv[1:]
    asyncio.run((serve if role == "gateway" else ask)(Path(directory), url))
