"""What a transport counts: bytes, connections again, and why one did not come about."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from linkpair import going
from mqttpeer import MqttPeer, serving

from tidegate.errors import DeviceRefusedError, LinkError, UnavailableError
from tidegate.link.broker_tls import TlsFiles
from tidegate.link.certificates import make_ca
from tidegate.link.counters import CounterName, LinkCounters, Tally
from tidegate.link.memory import MemoryBroker, MemoryTransport
from tidegate.link.mqtt import MqttTransport
from tidegate.link.traffic import Cause, Traffic, TrafficName, TrafficTally, cause_of
from tidegate.link.transport import Connected, Message, Transport
from tidegate.link.wire import MAX_MESSAGE_BYTES


def chained(error: BaseException, source: BaseException) -> BaseException:
    """`error`, raised from `source`."""
    try:
        raise error from source
    except type(error) as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (chained(UnavailableError("x"), socket.gaierror(-2, "unknown")), "unknown_host"),
        (chained(UnavailableError("x"), ConnectionRefusedError()), "unreachable"),
        (chained(UnavailableError("x"), ssl.SSLCertVerificationError("bad")), "tls"),
        (UnavailableError("connection lost (TLS: certificate required)"), "tls"),
        (chained(UnavailableError("x"), TimeoutError()), "timeout"),
        (UnavailableError("refused: Not authorized"), "refused"),
        (LinkError("its topics can be read"), "refused"),
        (DeviceRefusedError("device_revoked"), "refused"),
        (UnavailableError("connection lost"), "unreachable"),
    ],
)
def test_a_connection_that_fails_has_one_cause(error: BaseException, cause: Cause) -> None:
    assert cause_of(error) == cause
    tally = TrafficTally()
    tally.failed(error)
    assert tally.snapshot() == Traffic(**{f"connect_{cause}": 1})


def test_every_number_of_a_transport_is_a_counter_of_the_link_and_no_core_counts_it() -> None:
    names = [field.name for field in fields(Traffic)]
    assert set(names) == set(get_args(TrafficName))
    assert {field.name for field in fields(LinkCounters)} == {*names, *get_args(CounterName)}
    assert not set(names) & set(get_args(CounterName))
    traffic = Traffic(**{name: number for number, name in enumerate(names, 1)})
    counters = Tally().snapshot(traffic)
    assert all(getattr(counters, name) == getattr(traffic, name) for name in names)


def test_two_paths_together_are_the_sum_of_both() -> None:
    both = Traffic(reconnects=1, sent_bytes=5) + Traffic(sent_bytes=7, overflowed=2)
    assert both == Traffic(reconnects=1, sent_bytes=12, overflowed=2)


def test_only_the_first_connection_to_a_place_is_no_reconnect() -> None:
    tally = TrafficTally()
    for where in ("a", "b", "a", "a"):
        tally.connected(where)
    assert tally.snapshot().reconnects == 2


def play(transport: Transport, until: Callable[[], bool]) -> None:
    """Run a transport until its numbers are so."""

    async def main() -> None:
        async with asyncio.timeout(20), going(transport.run()):
            while not until():
                await asyncio.sleep(0.01)

    asyncio.run(main())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_where_nobody_listens_and_what_has_no_address_are_told_apart() -> None:
    nobody = MqttTransport(f"mqtt://127.0.0.1:{free_port()}")
    play(nobody, lambda: nobody.traffic.connect_unreachable > 1)
    nowhere = MqttTransport("mqtt://nowhere.invalid:1883")
    play(nowhere, lambda: nowhere.traffic.connect_unknown_host > 0)
    for transport in (nobody, nowhere):
        traffic = transport.traffic
        assert (traffic.reconnects, traffic.connections_lost, traffic.sent_bytes) == (0, 0, 0)
        assert (traffic.connect_tls, traffic.connect_refused, traffic.connect_timeout) == (0, 0, 0)
    assert nowhere.traffic.connect_unreachable == nobody.traffic.connect_unknown_host == 0


def test_a_broker_that_refuses_one_that_speaks_no_tls_and_one_that_is_silent_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.link.mqtt_connection.CONNECT_TIMEOUT_S", 0.5)
    ca = tmp_path / "ca.pem"
    ca.write_bytes(make_ca("home").certificate_pem)

    async def main() -> None:
        peer = MqttPeer(connack=b"\x20\x02\x00\x05")
        async with asyncio.timeout(20), serving(peer) as url:
            refused = MqttTransport(url)
            plain = MqttTransport(f"mqtts://127.0.0.1:{peer.port}", files=TlsFiles(ca=ca))
            async with going(refused.run()), going(plain.run()):
                while not (refused.traffic.connect_refused and told_apart(plain)):
                    await asyncio.sleep(0.01)
            assert refused.traffic.connect_tls == refused.traffic.connect_timeout == 0
            peer.connack = b""
            silent = MqttTransport(url)
            async with going(silent.run()):
                while not silent.traffic.connect_timeout:
                    await asyncio.sleep(0.01)
            assert silent.traffic.connect_refused == 0

    def told_apart(plain: MqttTransport) -> bool:
        # A peer without TLS hangs up or says what TLS does not understand, or nothing at all.
        traffic = plain.traffic
        assert traffic.connect_refused == traffic.connect_unknown_host == 0
        return traffic.connect_tls + traffic.connect_timeout > 0

    asyncio.run(main())


def test_a_broker_that_hangs_up_is_a_connection_lost_and_one_again() -> None:
    async def main() -> None:
        peer = MqttPeer(after_subscribe=b"\x20\x7f" + bytes(127))
        async with asyncio.timeout(20), serving(peer) as url:
            transport = MqttTransport(url)
            transport.subscribe("a")
            async with going(transport.run()):
                while not transport.traffic.reconnects:
                    await asyncio.sleep(0.01)
                assert transport.traffic.connections_lost >= 1
                while True:
                    with suppress(UnavailableError):
                        await transport.publish("a", bytes(300))
                        break
                    await asyncio.sleep(0.01)
                assert transport.traffic.sent_bytes == 300
            lost = transport.traffic.connections_lost
            assert transport.traffic.reconnects <= lost, "leaving on purpose is no loss"

    asyncio.run(main())


def test_bytes_count_both_ways_and_so_does_what_was_too_large() -> None:
    async def main() -> None:
        broker = MemoryBroker()
        speaker, listener = MemoryTransport(broker), MemoryTransport(broker)
        listener.subscribe("a")
        async with asyncio.timeout(20), going(speaker.run()), going(listener.run()):
            events = listener.events()
            assert await anext(events) == Connected()
            while not speaker.connected:
                await asyncio.sleep(0.01)
            await speaker.publish("a", bytes(10))
            await speaker.publish("b", bytes(5))
            await speaker.publish("a", bytes(MAX_MESSAGE_BYTES + 1))
            assert await anext(events) == Message("a", bytes(10))
            large = MAX_MESSAGE_BYTES + 1
            assert speaker.traffic == Traffic(sent_bytes=15 + large)
            assert listener.traffic == Traffic(received_bytes=10 + large, overflowed=1)
            broker.stop()
            broker.start()
            while not listener.traffic.reconnects:
                await asyncio.sleep(0.01)
            assert listener.traffic.connections_lost == 1

    asyncio.run(main())
