"""Broker URLs, what they never show, and a broker that is not there."""

from __future__ import annotations

import asyncio
import logging
import socket
import traceback
from pathlib import Path

import pytest

from tidegate.errors import ConfigError, UnavailableError
from tidegate.link.broker_url import BrokerUrl
from tidegate.link.mqtt import MqttTransport
from tidegate.link.mqtt_connection import WINDOW_PUBLISHES
from tidegate.link.transport import Connected, Disconnected


@pytest.mark.parametrize(
    ("url", "host", "port", "tls"),
    [
        ("mqtt://broker", "broker", 1883, False),
        ("mqtts://broker", "broker", 8883, True),
        ("mqtt://10.0.0.1:99/", "10.0.0.1", 99, False),
        ("mqtt://[::1]:1884", "::1", 1884, False),
    ],
)
def test_a_broker_url_is_understood(url: str, host: str, port: int, tls: bool) -> None:
    parsed = BrokerUrl.parse(url)
    assert (parsed.host, parsed.port, parsed.tls) == (host, port, tls)
    assert BrokerUrl.parse(str(parsed)) == parsed


def test_a_user_and_a_password_are_decoded_and_never_shown() -> None:
    parsed = BrokerUrl.parse("mqtt://me:s%3Acret@broker:1883")
    assert (parsed.username, parsed.password) == ("me", "s:cret")
    transport = MqttTransport("mqtt://me:s%3Acret@broker:1883")
    shown = f"{parsed} {parsed!r} {transport.status} {transport!r}"
    assert "cret" not in shown


@pytest.mark.parametrize(
    "url",
    [
        "",
        "broker",
        "http://broker",
        "mqtt://",
        "mqtt://me:secret@",
        "mqtt://me:secret@broker:0x10",
        "mqtt://me:secret@broker:70000",
        "mqtt://broker/topic",
        "mqtt://broker?x=1",
        "ftp://me:secret@broker",
        "mqtt://me:secret@x@broker:99999",
        "mqtt://[::1",
        "mqtt://broker#x",
        "mqtt://broker:0",
        "mqtt://me:secret@broker//",
        "mqtt://me:secret#x@broker",
        "mqtt://me:x#secret@broker",
        "mqtt://me:99#secret@broker",
        "mqtt://me:x?secret@broker",
        "mqtt://me:99/secret@broker",
        "mqtt://me:secret@bro\nker",
    ],
)
def test_another_url_is_refused_without_repeating_the_password(url: str) -> None:
    with pytest.raises(ConfigError, match="broker = ") as caught:
        BrokerUrl.parse(url)
    shown = "".join(traceback.format_exception(caught.value))
    assert "secret" not in shown


def test_a_file_of_roots_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        MqttTransport("mqtts://broker", ca_file=tmp_path / "ca.pem")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_an_absent_broker_is_reported_once_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = free_port()
    url = f"mqtt://127.0.0.1:{port}"

    async def main() -> None:
        transport = MqttTransport(url)
        task = asyncio.create_task(transport.run())
        await asyncio.sleep(1.0)
        assert not task.done()
        assert not transport.connected
        assert transport.status == f"broker {url}: cannot connect (connection refused)"
        with pytest.raises(UnavailableError, match="connection refused"):
            await transport.publish("a", b"")
        task.cancel()
        await asyncio.wait([task])

    with caplog.at_level(logging.INFO, logger="tidegate"):
        asyncio.run(main())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "trying again" in record.message


@pytest.mark.parametrize(
    "reply", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(64), b"\x20\x02\x00\x05"]
)
def test_something_that_is_no_broker_is_survived(reply: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(reply)
        await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        transport = MqttTransport(f"mqtt://127.0.0.1:{port}")
        task = asyncio.create_task(transport.run())
        await asyncio.sleep(0.5)
        assert not task.done()
        assert not transport.connected
        task.cancel()
        await asyncio.wait([task])
        server.close()
        await server.wait_closed()

    asyncio.run(main())


def test_a_broker_that_stops_acknowledging_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.link.mqtt_connection.ACKNOWLEDGE_TIMEOUT_S", 0.2)
    connections = 0

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read(100)
        writer.write(b"\x20\x02\x00\x00")
        while await reader.read(1000):
            pass
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        transport = MqttTransport(f"mqtt://127.0.0.1:{port}")
        task = asyncio.create_task(transport.run())
        events = transport.events()
        assert await anext(events) == Connected()
        for _ in range(WINDOW_PUBLISHES):
            await transport.publish("a", b"")
        with pytest.raises(UnavailableError, match="stopped acknowledging"):
            await transport.publish("a", b"")
        assert await anext(events) == Disconnected()
        assert await anext(events) == Connected()
        assert connections == 2
        task.cancel()
        await asyncio.wait([task])
        server.close()
        await server.wait_closed()

    async def limited() -> None:
        async with asyncio.timeout(20):
            await main()

    asyncio.run(limited())
