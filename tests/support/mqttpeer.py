"""A broker that behaves as a test says: it reads MQTT frames and answers by the book, or does not.

Not a broker: it relays nothing. `received` is every frame of every client, in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

CONNECT, PUBLISH, SUBSCRIBE, PINGREQ, DISCONNECT = 1, 3, 8, 12, 14


@dataclass(kw_only=True)
class MqttPeer:
    """What it does is switched by its fields, at any time."""

    acknowledge: bool = True
    """Answer publishes."""
    pong: bool = True
    """Answer pings."""
    after_subscribe: bytes = b""
    """Sent to a client that has subscribed, once."""
    connack: bytes = b"\x20\x02\x00\x00"
    refuse_mqtt5: bool = False
    hang_up_after_connect: bool = False
    read: bool = True
    """Take bytes off the wire; otherwise TCP's buffers fill."""
    port: int = 0
    connections: int = 0
    received: list[tuple[int, bytes]] = field(default_factory=list)

    def count(self, kind: int) -> int:
        return sum(got == kind for got, _ in self.received)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                while not self.read:
                    await asyncio.sleep(0.01)
                kind, body = await read_frame(reader)
                self.received.append((kind, body))
                if (answer := self.answer(kind, body)) is not None:
                    writer.write(answer)
                    await writer.drain()
                if kind == DISCONNECT or (kind == CONNECT and self.hang_up_after_connect):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    def answer(self, kind: int, body: bytes) -> bytes | None:
        if kind == CONNECT:
            unknown = self.refuse_mqtt5 and body[6] == 5
            return b"\x20\x02\x00\x01" if unknown else self.connack
        if kind == PINGREQ and self.pong:
            return b"\xd0\x00"
        if kind == SUBSCRIBE:
            extra, self.after_subscribe = self.after_subscribe, b""
            return b"\x90\x03" + body[:2] + b"\x01" + extra
        if kind == PUBLISH and self.acknowledge:
            at = 2 + int.from_bytes(body[:2], "big")
            return b"\x40\x02" + body[at : at + 2]
        return None


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The next frame: its type and what follows the fixed header."""
    kind = (await reader.readexactly(1))[0] >> 4
    length, shift = 0, 0
    while True:
        byte = (await reader.readexactly(1))[0]
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return kind, await reader.readexactly(length)


def publish_frame(topic: bytes, payload: bytes) -> bytes:
    """A PUBLISH at QoS 0; `topic` need not be one."""
    body = len(topic).to_bytes(2, "big") + topic + payload
    return b"\x30" + bytes((len(body),)) + body


@asynccontextmanager
async def serving(peer: MqttPeer) -> AsyncIterator[str]:
    """Listen on loopback around a block; gives the URL."""
    tasks: set[asyncio.Task[None]] = set()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        await peer.serve(reader, writer)

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    peer.port = server.sockets[0].getsockname()[1]
    try:
        yield f"mqtt://127.0.0.1:{peer.port}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
