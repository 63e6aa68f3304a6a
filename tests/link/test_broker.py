"""The embedded broker's refusals; that it relays is shown in tests/system."""

from __future__ import annotations

import asyncio
import socket
import sys

import pytest

from tidegate.errors import ConfigError, UnavailableError
from tidegate.link.broker import run_broker
from tidegate.link.mqtt import MqttTransport
from tidegate.link.transport import Connected, Message


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "example.org", "", "::"])
def test_it_listens_on_loopback_only(host: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        asyncio.run(run_broker(host, 1883))


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match="1 to 65535"):
        asyncio.run(run_broker("127.0.0.1", port))


def test_a_missing_amqtt_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "amqtt.broker", None)
    with pytest.raises(UnavailableError, match=r"pip install 'tidegate\[broker\]'"):
        asyncio.run(run_broker("127.0.0.1", 1883))


def test_a_taken_port_is_one_clear_error() -> None:
    pytest.importorskip("amqtt")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UnavailableError, match="cannot listen"):
            asyncio.run(run_broker("127.0.0.1", taken.getsockname()[1]))


def test_it_says_when_it_is_ready_and_ends_by_cancellation() -> None:
    pytest.importorskip("amqtt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def main() -> None:
        ready = asyncio.Event()
        task = asyncio.create_task(run_broker("127.0.0.1", port, on_ready=ready.set))
        async with asyncio.timeout(10):
            await ready.wait()
        transport = MqttTransport(f"mqtt://127.0.0.1:{port}")
        transport.subscribe("a/+")
        client = asyncio.create_task(transport.run())
        events = transport.events()
        async with asyncio.timeout(10):
            assert await anext(events) == Connected()
            await transport.publish("a/b", b"hello")
            assert await anext(events) == Message("a/b", b"hello")
        client.cancel()
        await asyncio.wait([client])
        # The broker closes its side a moment later; its shutdown does not wait for that.
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
