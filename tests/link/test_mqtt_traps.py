"""What paho, TCP and brokers do to a careless client, each with what we do about it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

import pytest
from mqttpeer import CONNECT, DISCONNECT, PINGREQ, PUBLISH, MqttPeer, publish_frame, serving

from tidegate.errors import LinkError, UnavailableError
from tidegate.link.mqtt import MqttTransport, pause_s
from tidegate.link.mqtt_connection import WINDOW_PUBLISHES, Access
from tidegate.link.topics import GONE, HERE
from tidegate.link.transport import Connected, Disconnected, Message, TransportEvent
from tidegate.link.wire import MAX_MESSAGE_BYTES


@asynccontextmanager
async def running(
    transport: MqttTransport,
) -> AsyncIterator[tuple[asyncio.Task[None], AsyncIterator[TransportEvent]]]:
    """The transport at work, from its first `Connected` on."""
    task = asyncio.create_task(transport.run())
    events = transport.events()
    try:
        assert await anext(events) == Connected()
        yield task, events
    finally:
        task.cancel()
        await asyncio.wait([task])


@asynccontextmanager
async def connected(
    peer: MqttPeer, *filters: str
) -> AsyncIterator[tuple[MqttTransport, asyncio.Task[None], AsyncIterator[TransportEvent]]]:
    """A transport at work on a broker that behaves as `peer` says."""
    async with serving(peer) as url:
        transport = MqttTransport(url)
        for topic_filter in filters:
            transport.subscribe(topic_filter)
        async with running(transport) as (task, events):
            yield transport, task, events


def run(main: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 20))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_no_more_publishes_are_in_flight_than_the_window_holds() -> None:
    peer = MqttPeer(acknowledge=False)

    async def main() -> None:
        async with connected(peer) as (transport, _, _):
            sending = [asyncio.create_task(transport.publish("a", b"%d" % i)) for i in range(40)]
            await until(lambda: peer.count(PUBLISH) == WINDOW_PUBLISHES)
            await asyncio.sleep(0.1)
            assert peer.count(PUBLISH) == WINDOW_PUBLISHES
            assert sum(task.done() for task in sending) == WINDOW_PUBLISHES
            for task in sending:
                task.cancel()
            await asyncio.wait(sending)

    run(main)


def test_a_publish_before_there_is_a_connection_is_refused_and_never_sent_later() -> None:
    peer = MqttPeer()

    async def main() -> None:
        async with serving(peer) as url:
            transport = MqttTransport(url)
            with pytest.raises(UnavailableError, match="not connected yet"):
                await transport.publish("a", b"early")
            async with running(transport):
                await transport.publish("a", b"late")
                await until(lambda: peer.count(PUBLISH) == 1)
        assert [body[-4:] for kind, body in peer.received if kind == PUBLISH] == [b"late"]

    run(main)


def test_a_reconnect_repeats_nothing() -> None:
    peer = MqttPeer(acknowledge=False)

    async def main() -> None:
        async with connected(peer) as (transport, _, events):
            for _ in range(5):
                await transport.publish("a", b"")
            await until(lambda: peer.count(PUBLISH) == 5)
            assert transport._connection is not None
            transport._connection._socket._socket.shutdown(2)  # as a cut cable shows
            assert await anext(events) == Disconnected()
            assert await anext(events) == Connected()
            await asyncio.sleep(0.1)
            assert peer.count(PUBLISH) == 5

    run(main)


def test_a_message_whose_handling_fails_does_not_end_the_listening() -> None:
    # Its topic is no UTF-8, which raises inside paho's callback.
    frames = publish_frame(b"\xff\xfe", b"bad") + publish_frame(b"t", b"good")
    peer = MqttPeer(after_subscribe=frames)

    async def main() -> None:
        async with connected(peer, "t") as (_, _, events):
            assert await anext(events) == Message("t", b"good")
            assert peer.connections == 1

    run(main)


@pytest.mark.parametrize(
    "frame",
    [
        b"\x30\x00",  # a PUBLISH without a topic
        b"\x30\x01\x00",
        b"\x30\x02\xff\xff",
        b"\x40\x00",  # a PUBACK without an id
        b"\x90\x01\x00",
        b"\x20\x01\x00",
        b"\x00\x00",
        b"\xf0\xff\xff\xff\xff\xff",
    ],
)
def test_a_packet_that_paho_trips_over_costs_the_connection_and_no_more(frame: bytes) -> None:
    peer = MqttPeer(after_subscribe=frame)

    async def main() -> None:
        async with connected(peer, "t") as (_, task, events):
            assert await anext(events) == Disconnected()
            assert await anext(events) == Connected()
            assert not task.done()
            assert peer.connections == 2

    run(main)


def test_a_packet_beyond_all_measure_is_not_waited_for() -> None:
    # 200 MB are announced and never sent.
    peer = MqttPeer(after_subscribe=b"\x30\x80\x84\xaf\x5f" + bytes(100))

    async def main() -> None:
        async with connected(peer, "t") as (transport, _, events):
            assert await anext(events) == Disconnected()
            assert "a packet of 2" in transport.status or transport.connected

    run(main)


def test_a_message_larger_than_anything_legal_is_not_sent() -> None:
    peer = MqttPeer()

    async def main() -> None:
        async with connected(peer) as (transport, _, _):
            with pytest.raises(UnavailableError, match="must be at most"):
                await transport.publish("a", bytes(MAX_MESSAGE_BYTES + 1))
            await transport.publish("a", b"small")
            await until(lambda: peer.count(PUBLISH) == 1)

    run(main)


def test_what_a_broker_says_it_can_take_is_kept_to() -> None:
    # MQTT 5: receive maximum 2, maximum packet size 1300.
    properties = b"\x21\x00\x02\x27\x00\x00\x05\x14"
    connack = b"\x20" + bytes((3 + len(properties), 0, 0, len(properties))) + properties
    peer = MqttPeer(connack=connack, acknowledge=False)

    async def main() -> None:
        async with serving(peer) as url:
            transport = MqttTransport(url, mqtt5=True)
            async with running(transport):
                with pytest.raises(UnavailableError, match="at most 1000 for this broker"):
                    await transport.publish("a", bytes(1001))
                sending = [asyncio.create_task(transport.publish("a", b"")) for _ in range(5)]
                await asyncio.sleep(0.1)
                assert peer.count(PUBLISH) == 2
                for task in sending:
                    task.cancel()
                await asyncio.wait(sending)

    run(main)


def test_a_broker_that_knows_no_mqtt_5_is_spoken_to_in_3_1_1_at_once() -> None:
    peer = MqttPeer(refuse_mqtt5=True)

    async def main() -> None:
        async with serving(peer) as url, running(MqttTransport(url, mqtt5=True)):
            levels = [body[6] for kind, body in peer.received if kind == CONNECT]
            assert levels == [5, 4]

    run(main)


def test_an_unanswered_publish_ends_the_connection_though_pings_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tidegate.link.mqtt_connection.ACKNOWLEDGE_TIMEOUT_S", 0.1)
    monkeypatch.setattr("tidegate.link.mqtt_connection._TICK_S", 0.05)
    peer = MqttPeer(acknowledge=False)

    async def main() -> None:
        async with connected(peer) as (transport, _, events):
            await transport.publish("a", b"")
            assert await anext(events) == Disconnected()
            assert "stopped acknowledging" in transport.status

    run(main)


def test_a_half_open_connection_is_noticed_by_its_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tidegate.link.mqtt_connection.KEEPALIVE_S", 1)
    monkeypatch.setattr("tidegate.link.mqtt_connection.PING_ANSWER_S", 0.3)
    monkeypatch.setattr("tidegate.link.mqtt_connection._TICK_S", 0.1)
    peer = MqttPeer()

    async def main() -> None:
        async with connected(peer) as (transport, _, events):
            await until(lambda: peer.count(PINGREQ) >= 2)
            assert transport.connected, "its pings are answered"
            peer.pong = False
            assert await anext(events) == Disconnected()
            assert "fallen silent" in transport.status

    run(main)


def test_a_machine_that_slept_is_not_told_that_the_broker_was_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tidegate.link.mqtt_connection.KEEPALIVE_S", 1)
    monkeypatch.setattr("tidegate.link.mqtt_connection.PING_ANSWER_S", 0.3)
    monkeypatch.setattr("tidegate.link.mqtt_connection._TICK_S", 0.5)
    peer = MqttPeer()

    async def main() -> None:
        async with connected(peer) as (transport, _, _):
            time.sleep(1.6)  # the whole process
            await asyncio.sleep(0.5)
            assert transport.connected
            assert peer.connections == 1

    run(main)


def test_a_slow_broker_makes_publishers_wait_and_holds_no_more_than_the_window() -> None:
    peer = MqttPeer()

    async def main() -> None:
        async with connected(peer) as (transport, _, _):
            peer.read = False
            sending = [
                asyncio.create_task(transport.publish("a", bytes(60_000))) for _ in range(200)
            ]
            await asyncio.sleep(0.2)
            one_it_was_reading = 1
            taken = sum(task.done() for task in sending)
            assert taken <= WINDOW_PUBLISHES + one_it_was_reading
            peer.read = True
            await asyncio.gather(*sending)
            await until(lambda: peer.count(PUBLISH) == 200)

    run(main)


def test_reconnects_are_spread_over_the_whole_wait() -> None:
    rng = random.Random(1)
    waits = [pause_s(10, rng) for _ in range(2000)]
    assert min(waits) < 0.5
    assert 14.0 < max(waits) <= 15.0
    assert 7.0 < sum(waits) / len(waits) < 8.0
    assert all(0.05 <= pause_s(0, rng) <= 0.2 for _ in range(100))


def test_connections_that_end_at_once_come_ever_slower() -> None:
    peer = MqttPeer(hang_up_after_connect=True)

    async def main() -> None:
        async with serving(peer) as url:
            transport = MqttTransport(url)
            transport._rng = random.Random(3)
            task = asyncio.create_task(transport.run())
            await asyncio.sleep(2.5)
            assert 2 <= peer.connections <= 12
            task.cancel()
            await asyncio.wait([task])

    run(main)


def test_a_clean_end_lets_what_is_in_flight_arrive_and_says_goodbye() -> None:
    peer = MqttPeer()

    async def main() -> None:
        async with serving(peer) as url:
            transport = MqttTransport(url, presence="s/me")
            async with running(transport) as (task, _):
                for i in range(10):
                    await transport.publish("a", b"%d" % i)
                task.cancel()
                await asyncio.wait([task])
                await until(lambda: peer.count(DISCONNECT) == 1)
            payloads = [body[2 + body[1] + 2 :] for kind, body in peer.received if kind == PUBLISH]
            assert [payload[:1] for payload in payloads[:1]] == [HERE]
            assert payloads[1:11] == [b"%d" % i for i in range(10)]
            assert payloads[11][:1] == GONE
            assert payloads[11][1:] == payloads[0][1:], "it names the same session"

    run(main)


def test_a_clean_end_does_not_wait_for_a_broker_that_answers_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tidegate.link.mqtt.GOODBYE_S", 0.2)
    peer = MqttPeer(acknowledge=False)

    async def main() -> None:
        async with connected(peer) as (transport, task, _):
            await transport.publish("a", b"")
            task.cancel()
            async with asyncio.timeout(2):
                await asyncio.wait([task])

    run(main)


def test_the_will_is_left_with_the_broker_when_connecting() -> None:
    peer = MqttPeer()

    async def main() -> None:
        async with serving(peer) as url, running(MqttTransport(url, presence="s/me")):
            pass
        connect = next(body for kind, body in peer.received if kind == CONNECT)
        assert connect[7] & 0b00100100 == 0b00100100, "a will, retained"
        assert b"s/me" in connect

    run(main)


def test_a_refused_broker_is_not_used_and_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tidegate.link.mqtt.RECHECK_S", 0.05)
    peer = MqttPeer()
    looks = 0

    async def check(access: Access) -> None:
        nonlocal looks
        looks += 1
        if looks < 3:
            raise LinkError("this broker lets anyone in")

    async def main() -> None:
        async with serving(peer) as url:
            transport = MqttTransport(url, check=check)
            task = asyncio.create_task(transport.run())
            await until(lambda: looks == 1)
            await asyncio.sleep(0)
            assert peer.connections == 0
            assert "refused: this broker lets anyone in" in transport.status
            assert await anext(transport.events()) == Connected()
            assert looks == 3
            task.cancel()
            await asyncio.wait([task])

    run(main)
