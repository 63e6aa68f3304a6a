"""The same load over plain paho, to be killed: `worker_plain.py ROLE SETTINGS`.

What a careful team does without an outbox: persistent sessions, fixed client ids, a correlation id
and a number on every chunk, repeated chunks sorted out, quick reconnects, a broker that writes its
store to disk every second. Delivery is left to QoS 1 or 2. A request for which nothing has come
for `deadline_s` is given up.

    request   n u32 | body                      chunk   n u32 | number u16 | last u8 | payload
"""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import paho.mqtt.client as paho
from link.ledger import TIME_IS_UP, Ledger, LedgerReader
from link.load import answer_to, body_of, expected_of, number_of
from link.settings import Settings
from paho.mqtt.enums import CallbackAPIVersion

from tidegate.link.broker_url import BrokerUrl

_REQUEST = struct.Struct(">I")
_CHUNK = struct.Struct(">IHB")
ASKED, SAID = "plain/q/device", "plain/r/device"
SLOT_S = 3.0
"""A request without news frees its place for the next one, and is waited for all the same."""


def connect(
    settings: Settings, name: str, topic: str, hear: Callable[[bytes], None]
) -> paho.Client:
    """A client with a persistent session; `hear` runs on the event loop."""
    loop = asyncio.get_running_loop()
    url = BrokerUrl.parse(settings.url)
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, clean_session=False)
    client.reconnect_delay_set(1, 2)
    client.on_connect = lambda client, *_: client.subscribe(topic, settings.qos)

    def on_message(client: paho.Client, userdata: object, message: paho.MQTTMessage) -> None:
        loop.call_soon_threadsafe(hear, bytes(message.payload))

    client.on_message = on_message
    client.connect_async(url.host, url.port, keepalive=30)
    client.loop_start()
    return client


async def serve(settings: Settings) -> None:
    """The cloud's end."""
    ledger = Ledger(settings.runs)
    tasks: set[asyncio.Task[None]] = set()

    def hear(message: bytes) -> None:
        task = asyncio.create_task(answer(message[_REQUEST.size :]))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def answer(body: bytes) -> None:
        number = number_of(body)
        ledger.note("run", number)
        held: bytes | None = None
        at = 0
        async for payload in answer_to(body, word_s=settings.word_s):
            if held is not None:
                client.publish(SAID, _CHUNK.pack(number, at, 0) + held, settings.qos)
                at += 1
            held = payload
        client.publish(SAID, _CHUNK.pack(number, at, 1) + (held or b""), settings.qos)

    client = connect(settings, "plain-gateway", ASKED, hear)
    client.on_subscribe = lambda *_: settings.subscribed.touch()
    await asyncio.Event().wait()


@dataclass
class Waiting:
    """An answer that is arriving."""

    chunks: dict[int, bytes] = field(default_factory=dict)
    count: int | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def whole(self) -> bool:
        return self.count is not None and len(self.chunks) >= self.count


class Application:
    """Asks every number once, several at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._waiting: dict[int, Waiting] = {}
        self._begun: set[int] = set()
        self._over: set[int] = set()
        for entry in LedgerReader(settings.ledger).fresh():
            (self._begun if entry.what == "submitted" else self._over).add(entry.number)
        self._waiting |= {number: Waiting() for number in self._begun - self._over}
        self._ledger = Ledger(settings.ledger)
        self._client = connect(settings, "plain-device", SAID, self._hear)

    async def ask_all(self) -> None:
        """What was begun before is not asked again: the broker holds what is to come."""
        numbers = iter(n for n in range(self._settings.requests) if n not in self._begun)
        async with asyncio.TaskGroup() as tasks:
            for number in self._begun - self._over:
                tasks.create_task(self._wait(number))
            for _ in range(self._settings.together):
                tasks.create_task(self._ask_each(numbers, tasks))

    async def _ask_each(self, numbers: Iterator[int], tasks: asyncio.TaskGroup) -> None:
        for number in numbers:
            body = body_of(number, self._settings.words)
            self._ledger.note("submitted", number)
            self._waiting[number] = Waiting()
            self._client.publish(ASKED, _REQUEST.pack(number) + body, self._settings.qos)
            waiting = tasks.create_task(self._wait(number))
            await asyncio.wait([waiting], timeout=SLOT_S)

    async def _wait(self, number: int) -> None:
        waiting = self._waiting[number]
        while not waiting.whole:
            waiting.news.clear()
            try:
                async with asyncio.timeout(self._settings.deadline_s):
                    await waiting.news.wait()
            except TimeoutError:
                self._ledger.note("failed", number, code=TIME_IS_UP)
                break
        else:
            expected = await expected_of(body_of(number, self._settings.words))
            got = [waiting.chunks[at] for at in sorted(waiting.chunks)]
            self._ledger.note("answered", number, right=got == expected)
        del self._waiting[number]

    def _hear(self, message: bytes) -> None:
        number, at, last = _CHUNK.unpack_from(message)
        waiting = self._waiting.get(number)
        if waiting is None or at in waiting.chunks:
            self._ledger.note("repeated", number)
            return
        waiting.chunks[at] = message[_CHUNK.size :]
        waiting.count = at + 1 if last else waiting.count
        waiting.news.set()


async def ask(settings: Settings) -> None:
    """The device's end, until everything has ended."""
    await Application(settings).ask_all()


if __name__ == "__main__":
    chosen = Settings.read(Path(sys.argv[2]))
    asyncio.run((serve if sys.argv[1] == "gateway" else ask)(chosen))
