"""One HTTP exchange on a connection of its own, by a client that may leave, dawdle or be cut off.

On h11 and asyncio's streams, because a library would hide what matters here: whether the answer's
end came, and when nothing came at all.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import h11

_READ_BYTES = 1 << 16
_SLOW_BYTES = 256
_SLOW_S = 0.02
_PATIENCE_S = 120.0

Way = Literal["patient", "slow", "leaves at once", "leaves midway"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request and how its client behaves. `content` goes out as it is."""

    kind: str
    content: bytes = field(repr=False)
    key: str | None = field(repr=False)
    way: Way = "patient"
    path: str = "/v1/chat/completions"
    method: str = "POST"


@dataclass(kw_only=True)
class Exchange:
    """What came back."""

    status: int | None = None
    """None: the connection ended, or was refused, before any answer."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)
    whole: bool = False
    """The answer's end came, as HTTP has it."""
    left: bool = False
    """The client went before that."""
    first_s: float | None = None
    """To the first byte of the body."""
    total_s: float = 0.0

    @property
    def json(self) -> Any:
        """The body; None if it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    def events(self) -> list[str]:
        """The data of server-sent events."""
        parts = self.body.decode(errors="replace").split("\n\n")
        return [part.removeprefix("data: ") for part in parts if part.startswith("data: ")]


async def exchange(port: int, asked: Asked) -> Exchange:
    """Ask once. What the network does is told in the result, never raised.

    Raises:
        TimeoutError: nothing for two minutes: nobody answers, and nobody hangs up.
    """
    found, began_s = Exchange(), time.perf_counter()
    made = socket.socket()
    made.setblocking(False)
    if asked.way == "slow":
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    try:
        await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=made, limit=1 << 18)
    except OSError:
        made.close()
        return found
    try:
        async with asyncio.timeout(_PATIENCE_S):
            await _converse(reader, writer, asked, found, began_s)
    except (OSError, h11.RemoteProtocolError):
        pass  # cut off: `whole` stays False
    finally:
        writer.close()
        found.total_s = time.perf_counter() - began_s
    return found


async def _converse(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    asked: Asked,
    found: Exchange,
    began_s: float,
) -> None:
    http = h11.Connection(h11.CLIENT)
    head = [("Host", "127.0.0.1"), ("Content-Type", "application/json"), ("Connection", "close")]
    head.append(("Content-Length", str(len(asked.content))))
    if asked.key is not None:
        head.append(("Authorization", f"Bearer {asked.key}"))
    request = h11.Request(method=asked.method, target=asked.path, headers=head)
    for event in (request, h11.Data(data=asked.content), h11.EndOfMessage()):
        writer.write(http.send(event) or b"")
    await writer.drain()
    if asked.way == "leaves at once":
        await asyncio.sleep(0.02)
        found.left = True
        return
    while not found.whole:
        event = http.next_event()
        if event is h11.NEED_DATA:
            if asked.way == "slow":
                await asyncio.sleep(_SLOW_S)
            http.receive_data(
                await reader.read(_SLOW_BYTES if asked.way == "slow" else _READ_BYTES)
            )
        elif isinstance(event, h11.Response):
            found.status = event.status_code
            found.headers = {name.decode(): value.decode() for name, value in event.headers}
        elif isinstance(event, h11.Data):
            if found.first_s is None:
                found.first_s = time.perf_counter() - began_s
            found.body += bytes(event.data)
            if asked.way == "leaves midway" and found.body.count(b"\n\n") >= 3:
                found.left = True
                return
        elif isinstance(event, h11.EndOfMessage):
            found.whole = True
        else:
            return
