"""One end of the sealed link under load, to be killed: `worker_sealed.py ROLE SETTINGS`.

The device's application writes to its ledger before it asks and as it reads an answer's last
event, which is before the link forgets the request: whenever it dies, it knows what to take up.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from link.ledger import TIME_IS_UP, Ledger, LedgerReader
from link.load import answer_to, body_of, expected_of, number_of
from link.settings import Settings

from tidegate.errors import TidegateError
from tidegate.link.device import DeviceLink
from tidegate.link.effects import InboundRequest
from tidegate.link.envelope import RequestId, new_request_id
from tidegate.link.gateway import Gateway
from tidegate.link.identity import load_device
from tidegate.link.mqtt import MqttTransport
from tidegate.link.topics import Topics


async def serve(settings: Settings) -> None:
    """The gateway."""
    ledger = Ledger(settings.runs)

    async def answer(request: InboundRequest) -> AsyncIterator[bytes]:
        ledger.note("run", number_of(request.body))
        async for payload in answer_to(request.body, word_s=settings.word_s):
            yield payload

    transport = MqttTransport(settings.url)
    await Gateway(
        settings.folder / "gateway", transport, answer, max_requests=256, timing=settings.timing
    ).run()


class Application:
    """What asks the device: every number once, several at a time."""

    def __init__(self, settings: Settings, device: DeviceLink) -> None:
        self._settings = settings
        self._device = device
        self._ids: dict[int, RequestId] = {}
        self._over: set[int] = set()
        for entry in LedgerReader(settings.ledger).fresh():
            if entry.what == "submitted":
                self._ids[entry.number] = RequestId(bytes.fromhex(entry.request_id))
            else:
                self._over.add(entry.number)
        self._ledger = Ledger(settings.ledger)

    async def ask_all(self) -> None:
        """Those begun before come first; those over but not forgotten are read to their end."""
        stored = {pending.request_id for pending in await self._device.pending()}
        left = [n for n, name in self._ids.items() if name in stored or n not in self._over]
        left += [n for n in range(self._settings.requests) if n not in self._ids]
        numbers = iter(left)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._settings.together):
                tasks.create_task(self._ask_each(numbers))

    async def _ask_each(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            await self._ask(number)

    async def _ask(self, number: int) -> None:
        settings = self._settings
        body = body_of(number, settings.words)
        expected = await expected_of(body)
        name = self._ids.get(number)
        if name is None:
            name = self._ids[number] = new_request_id(time.time_ns() // 1_000_000)
            self._ledger.note("submitted", number, request_id=name.hex())
        got: list[bytes] = []
        try:
            answer = self._device.request(body, deadline_s=settings.deadline_s, request_id=name)
            async with aclosing(answer):
                async for payload in answer:
                    got.append(payload)
                    if json.loads(payload)["event"] == "finished":
                        self._end(number, right=got == expected)
            if number not in self._over or len(got) > len(expected):
                self._end(number, right=False)
        except TidegateError as error:
            late = "deadline" in str(error)
            if number not in self._over:
                self._over.add(number)
                code = TIME_IS_UP if late else f"{error.code}: {error}"
                self._ledger.note("failed", number, code=code)

    def _end(self, number: int, *, right: bool) -> None:
        if number not in self._over or not right:
            self._over.add(number)
            self._ledger.note("answered", number, right=right)


async def ask(settings: Settings) -> None:
    """The device, until everything has ended."""
    folder = settings.folder / "device"
    identity = load_device(folder)
    # As the daemon does: the gateway hears that its device has come.
    presence = Topics(identity.group).presence(identity.handle)
    transport = MqttTransport(settings.url, presence=presence)
    device = DeviceLink(folder, transport, timing=settings.timing)
    running = asyncio.create_task(device.run())
    await Application(settings, device).ask_all()
    running.cancel()
    await asyncio.wait([running])
    await device.close()


if __name__ == "__main__":
    chosen = Settings.read(Path(sys.argv[2]))
    asyncio.run((serve if sys.argv[1] == "gateway" else ask)(chosen))
