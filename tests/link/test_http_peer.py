"""A device that meets something else than its gateway: it is left, named, and holds no memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from linkhttp import http_of, running, until

from tidegate.errors import ConfigError
from tidegate.link.fleet import pair
from tidegate.link.http_access import CHALLENGE_BYTES
from tidegate.link.http_device import HttpTransport
from tidegate.link.http_frames import HEAD, Frame, Kind
from tidegate.link.identity import load_device
from tidegate.link.transport import Connected, Disconnected, Message

Talk = Callable[[str, asyncio.StreamWriter], Awaitable[None]]
CHALLENGE = json.dumps({"gateway": "gw0", "challenge": "00" * CHALLENGE_BYTES}).encode()
BEAT = Frame(Kind.BEAT).encode()


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet")
    pair(folder / "device", folder / "gateway")
    return folder / "device"


def run(main: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 30))


def answer(status: int, body: bytes, *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@asynccontextmanager
async def server(talk: Talk) -> AsyncIterator[str]:
    """Something that listens; `talk` answers the request line it got."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            await talk(head.decode().split("\r\n")[0], writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        listening.close()


async def problem(device: Path, talk: Talk) -> str:
    """What the transport says is wrong with what answers there."""
    async with server(talk) as url:
        transport = http_of(url, device)
        async with running(transport.run):
            await until(lambda: "not connected yet" not in transport.status, "it has tried")
            assert not transport.connected
            return transport.status.split(": ", 1)[1]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (answer(200, b"<html>please log in"), "what answers there is no gateway"),
        (answer(200, b'{"gateway": "gw0"}'), "what answers there is no gateway"),
        (answer(200, b'{"gateway": "../x", "challenge": "00"}'), "what answers there is no"),
        (answer(200, b"[" * 3000), "what answers there is no gateway"),
        (answer(200, b"[]"), "what answers there is no gateway"),
        (answer(302, b"", "Location: http://elsewhere/"), "HTTP 302"),
        (answer(404, b"nothing"), "HTTP 404: no reason given"),
        (answer(500, b'{"error": {"code": "\\u001b[2J"}}'), "HTTP 500: no reason given"),
        (answer(503, b'{"error": {"code": "over_capacity"}}'), "HTTP 503: over_capacity"),
        (b"no HTTP at all\r\n\r\n", "connection lost"),
        (b"", "connection lost"),
    ],
)
def test_what_is_no_gateway_is_named(device: Path, said: bytes, told: str) -> None:
    async def talk(line: str, writer: asyncio.StreamWriter) -> None:
        writer.write(said)

    async def main() -> None:
        assert told in await problem(device, talk)

    run(main)


def test_an_endless_answer_is_not_read_to_its_end(device: Path) -> None:
    async def talk(line: str, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM)
        while True:
            writer.write(chunk(b"x" * 65536))
            await writer.drain()

    async def main() -> None:
        assert "no gateway" in await problem(device, talk)

    run(main)


def test_a_port_without_a_listener_is_named(device: Path) -> None:
    async def main() -> None:
        transport = http_of("http://127.0.0.1:1", device)
        async with running(transport.run):
            await until(lambda: "not connected yet" not in transport.status, "it has tried")
            assert "connection refused" in transport.status

    run(main)


def streaming(*parts: bytes) -> Talk:
    """A gateway that says `parts` on its stream and then nothing."""

    async def talk(line: str, writer: asyncio.StreamWriter) -> None:
        if "/challenge" in line:
            writer.write(answer(200, CHALLENGE))
            return
        writer.write(STREAM)
        for part in parts:
            writer.write(chunk(part))
            await writer.drain()
        await asyncio.Event().wait()

    return talk


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([HEAD.pack(Kind.MESSAGE, 2**32 - 1)], "must be at most"),
        ([Frame(Kind.BYE, b"replaced").encode()], "ended the stream: replaced"),
        ([Frame(Kind.BYE, b"\x1b[2J").encode()], "ended the stream: no reason given"),
        ([Frame(Kind.BYE, b"device_revoked").encode()], "refused: the gateway takes nothing"),
    ],
)
def test_a_stream_that_ends_says_why(device: Path, parts: list[bytes], told: str) -> None:
    async def main() -> None:
        async with server(streaming(BEAT, *parts)) as url:
            transport = http_of(url, device)
            async with running(transport.run):
                events = transport.events()
                assert await anext(events) == Connected()
                assert await anext(events) == Disconnected()
                await until(lambda: told in transport.status, transport.status)

    run(main)


def test_frames_are_understood_however_they_are_cut(device: Path) -> None:
    body = BEAT + Frame(Kind.MESSAGE, b"answer").encode() + HEAD.pack(77, 2) + b"??" + BEAT
    body += Frame(Kind.ADVERT, b"advert").encode()
    handle = load_device(device).handle

    async def main() -> None:
        async with server(streaming(*(bytes([byte]) for byte in body))) as url:
            transport = http_of(url, device)
            async with running(transport.run):
                events = transport.events()
                assert await anext(events) == Connected()
                assert await anext(events) == Message(f"tidegate/1/home/r/{handle}", b"answer")
                assert await anext(events) == Message("tidegate/1/home/gw/gw0/advert", b"advert")

    run(main)


def test_a_stream_that_falls_silent_is_left(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.link.http_peer.SILENT_S", 0.2)

    async def main() -> None:
        async with server(streaming(BEAT)) as url:
            transport = http_of(url, device)
            async with running(transport.run):
                events = transport.events()
                assert await anext(events) == Connected()
                assert await anext(events) == Disconnected()
                await until(lambda: "silent" in transport.status, transport.status)

    run(main)


async def say_much(transport: HttpTransport, handle: str) -> None:
    for _ in range(100):
        await transport.publish(f"tidegate/1/home/gw/gw0/q/{handle}", bytes(90_000))


def test_a_gateway_that_takes_nothing_makes_publishing_wait_and_not_grow(device: Path) -> None:
    async def main() -> None:
        async with server(streaming(BEAT)) as url:
            transport = http_of(url, device)
            handle = load_device(device).handle
            async with running(transport.run):
                assert await anext(transport.events()) == Connected()
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(say_much(transport, handle), 1)
                peer = transport._ways[0].peer
                assert peer is not None
                assert peer._waiting_bytes < 1024 * 1024

    run(main)


def test_too_many_gateways_are_refused(device: Path) -> None:
    with pytest.raises(ConfigError, match=r"link\.http"):
        HttpTransport(["http://127.0.0.1:1"] * 9, lambda: load_device(device))


def test_a_proxy_of_the_environment_is_not_used_for_this_machine(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")

    async def main() -> None:
        async with server(streaming(BEAT)) as url:
            transport = http_of(url, device)
            async with running(transport.run):
                assert await anext(transport.events()) == Connected()

    run(main)
