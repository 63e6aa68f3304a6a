"""mosquitto as `tidegate broker config` sets it up: who may connect, and to whose topics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from linkbrokers import BrokerProcess, SecureBroker
from linklab import FAST

from tidegate.errors import LinkError, UnavailableError
from tidegate.link.broker_access import device_transport, gateway_transport
from tidegate.link.broker_check import (
    CANARY_HANDLE,
    check_broker,
    device_plan,
    find_breaches,
    gateway_plan,
)
from tidegate.link.broker_tls import TlsFiles, tls_context
from tidegate.link.broker_url import BrokerUrl
from tidegate.link.certificates_store import BROKER_CA, BROKER_CERTIFICATE, BROKER_KEY
from tidegate.link.device import DeviceLink
from tidegate.link.effects import InboundRequest
from tidegate.link.fleet import pair
from tidegate.link.gateway import Gateway
from tidegate.link.identity import load_device
from tidegate.link.mosquitto import RULES
from tidegate.link.mqtt import MqttTransport
from tidegate.link.mqtt_connection import Access, Connection
from tidegate.link.topics import Topics
from tidegate.link.transport import Connected, EventQueue, Message

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

ALICE, BOB = "a" * 32, "b" * 32
TOPICS = Topics("home")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[SecureBroker]:
    broker = SecureBroker(tmp_path / "secure")
    broker.process.start()
    yield broker
    broker.process.kill()


def run(main: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


def access(broker: SecureBroker, files: TlsFiles) -> Access:
    return Access(url=BrokerUrl.parse(broker.url), tls=tls_context(files), mqtt5=True)


@asynccontextmanager
async def client(
    broker: SecureBroker, files: TlsFiles, *filters: str
) -> AsyncIterator[tuple[Connection, EventQueue]]:
    queue = EventQueue()
    connection = Connection(access(broker, files), queue)
    try:
        await connection.open()
        if filters:
            await connection.subscribe(list(filters))
        yield connection, queue
    finally:
        await connection.close()


def heard(queue: EventQueue) -> Sequence[str]:
    return [event.topic for event in queue.take_all() if isinstance(event, Message)]


def test_a_device_reads_its_answers_and_nobody_elses(broker: SecureBroker) -> None:
    async def main() -> None:
        everything = ("#", TOPICS.response("+"), TOPICS.response(BOB), TOPICS.request("+", "+"))
        files = broker.device(ALICE)
        async with client(broker, files, *everything, TOPICS.response(ALICE)) as (_, queue):
            async with client(broker, broker.gateway("gw0")) as (gateway, _):
                for topic in (TOPICS.response(ALICE), TOPICS.response(BOB), TOPICS.advert("gw0")):
                    assert await gateway.try_publish(topic, b"x")
            async with client(broker, broker.device(BOB)) as (bob, _):
                for topic in (TOPICS.request("gw0", BOB), TOPICS.presence(BOB)):
                    assert await bob.try_publish(topic, b"x")
            await asyncio.sleep(0.3)
            assert set(heard(queue)) == {TOPICS.response(ALICE), TOPICS.advert("gw0")}

    run(main)


@pytest.mark.parametrize(
    ("topic", "allowed"),
    [
        (TOPICS.request("gw0", ALICE), True),
        (TOPICS.request("another", ALICE), True),
        (TOPICS.presence(ALICE), True),
        (TOPICS.request("gw0", BOB), False),
        (TOPICS.presence(BOB), False),
        (TOPICS.response(ALICE), False),
        (TOPICS.response(BOB), False),
        (TOPICS.advert("gw0"), False),
        (Topics("another").request("gw0", ALICE), False),
        ("$SYS/broker/version", False),
        ("anything", False),
    ],
)
def test_a_device_writes_its_requests_and_its_presence_only(
    broker: SecureBroker, topic: str, allowed: bool
) -> None:
    async def main() -> None:
        async with client(broker, broker.device(ALICE)) as (device, _):
            assert await device.try_publish(topic, b"x") is allowed

    run(main)


@pytest.mark.parametrize(
    ("topic", "allowed"),
    [
        (TOPICS.advert("gw0"), True),
        (TOPICS.response(ALICE), True),
        (TOPICS.advert("gw1"), False),
        (TOPICS.request("gw1", ALICE), False),
        (TOPICS.request("gw0", ALICE), False),
        (TOPICS.presence(ALICE), False),
    ],
)
def test_a_gateway_writes_its_advert_and_answers_only(
    broker: SecureBroker, topic: str, allowed: bool
) -> None:
    async def main() -> None:
        async with client(broker, broker.gateway("gw0")) as (gateway, _):
            assert await gateway.try_publish(topic, b"x") is allowed

    run(main)


def test_a_gateway_reads_its_own_requests_and_who_is_there(broker: SecureBroker) -> None:
    async def main() -> None:
        async with client(broker, broker.gateway("gw0"), "#") as (_, queue):
            async with client(broker, broker.device(ALICE)) as (device, _):
                for topic in (
                    TOPICS.request("gw0", ALICE),
                    TOPICS.request("gw1", ALICE),
                    TOPICS.presence(ALICE),
                ):
                    assert await device.try_publish(topic, b"x")
            await asyncio.sleep(0.3)
            assert set(heard(queue)) == {TOPICS.request("gw0", ALICE), TOPICS.presence(ALICE)}

    run(main)


async def refusal(broker: SecureBroker, files: TlsFiles) -> str:
    """What a client with these files is told."""
    with pytest.raises(UnavailableError) as caught:
        async with client(broker, files):
            pass
    return str(caught.value)


def test_without_a_certificate_nobody_connects(broker: SecureBroker) -> None:
    async def main() -> None:
        assert "certificate required" in await refusal(broker, broker.stranger())

    run(main)


def test_another_fleets_certificate_is_of_no_use(broker: SecureBroker, tmp_path: Path) -> None:
    other = SecureBroker(tmp_path / "other").device(ALICE)

    async def main() -> None:
        ours = broker.stranger()
        told = await refusal(broker, replace(other, ca=ours.ca))
        assert "unknown ca" in told or "decrypt error" in told

    run(main)


def test_an_expired_certificate_is_of_no_use(broker: SecureBroker) -> None:
    files = broker.device(ALICE, days=1, now_s=time.time() - 3 * 86400)

    async def main() -> None:
        assert "certificate expired" in await refusal(broker, files)

    run(main)


def test_a_revoked_certificate_is_of_no_use_once_the_broker_has_read_the_list(
    broker: SecureBroker,
) -> None:
    alice, bob = broker.device(ALICE), broker.device(BOB)
    assert alice.certificate is not None
    revoked = alice.certificate.read_bytes()

    async def main() -> None:
        async with client(broker, alice):
            pass
        broker.write(revoked=[revoked])
        broker.process.reload()
        await asyncio.sleep(0.3)
        assert "certificate revoked" in await refusal(broker, alice)
        async with client(broker, bob):
            pass

    run(main)


def test_tls_1_2_is_refused(broker: SecureBroker) -> None:
    import ssl

    async def main() -> None:
        files = broker.device(ALICE)
        old = access(broker, files)
        assert old.tls is not None
        old.tls.minimum_version = ssl.TLSVersion.TLSv1_2
        old.tls.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(UnavailableError, match="protocol version"):
            await Connection(old, EventQueue()).open()

    run(main)


def test_a_broker_with_our_rules_passes_the_look_before(broker: SecureBroker) -> None:
    async def main() -> None:
        await check_broker(access(broker, broker.device(ALICE)), device_plan("home", ALICE))
        await check_broker(access(broker, broker.gateway("gw0")), gateway_plan("home", "gw0"))

    run(main)


@pytest.mark.parametrize(
    ("rule", "breach"),
    [
        (f"pattern readwrite {TOPICS.response('+')}", "write tidegate/1/home/r/check-"),
        (f"pattern write {TOPICS.request('+', '+')}", "write tidegate/1/home/gw/check-"),
        (f"pattern write {TOPICS.presence('+')}", "write tidegate/1/home/s/check-"),
        (f"pattern write {TOPICS.advert('+')}", "/advert"),
        (f"pattern read {TOPICS.request('+', '+')}", "read tidegate/1/home/gw/check-"),
        (f"pattern read {TOPICS.response('+')}", f"read tidegate/1/home/r/{CANARY_HANDLE}"),
        (f"pattern read {TOPICS.presence('+')}", f"read tidegate/1/home/s/{BOB}"),
        ("pattern readwrite #", "read tidegate"),
    ],
)
def test_a_rule_too_many_is_found_from_a_device(
    broker: SecureBroker, rule: str, breach: str
) -> None:
    with (broker.folder / RULES).open("a") as rules:
        rules.write(f"{rule}\n")
    broker.process.reload()

    async def main() -> None:
        await asyncio.sleep(0.3)
        retained = ((broker.gateway("gw0"), TOPICS.response(CANARY_HANDLE)),)
        for files, topic in (*retained, (broker.device(BOB), TOPICS.presence(BOB))):
            async with client(broker, files) as (other, _):
                await other.publish(topic, b"x", retain=True)
                await other.drain(1)
        found = await find_breaches(
            access(broker, broker.device(ALICE)), device_plan("home", ALICE)
        )
        assert breach in str(found)

    run(main)


@pytest.mark.parametrize(
    ("rule", "breach"),
    [
        (f"topic read {TOPICS.response('+')}", "read tidegate/1/home/r/check-"),
        (f"topic write {TOPICS.request('+', '+')}", "write tidegate/1/home/gw/check-"),
        (f"topic write {TOPICS.advert('+')}", "/advert"),
    ],
)
def test_a_rule_too_many_is_found_from_a_gateway(
    broker: SecureBroker, rule: str, breach: str
) -> None:
    with (broker.folder / RULES).open("a") as rules:
        rules.write(f"{rule}\n")  # the last section of the file is gw0's
    broker.process.reload()

    async def main() -> None:
        await asyncio.sleep(0.3)
        found = await find_breaches(
            access(broker, broker.gateway("gw0")), gateway_plan("home", "gw0")
        )
        assert breach in str(found)

    run(main)


def test_on_an_open_mqtt_3_1_1_broker_what_is_written_and_read_shows(tmp_path: Path) -> None:
    broker = BrokerProcess("amqtt", tmp_path)
    broker.start()

    async def main() -> None:
        where = Access(url=BrokerUrl.parse(broker.url), tls=None)
        found = await find_breaches(where, device_plan("home", ALICE))
        assert found.readable
        assert not found.writable, "3.1.1 does not tell"

    try:
        run(main)
    finally:
        broker.kill()


def install(files: TlsFiles, keys: Path) -> None:
    """Put TLS files into a folder of keys."""
    for source, name in (
        (files.ca, BROKER_CA),
        (files.certificate, BROKER_CERTIFICATE),
        (files.key, BROKER_KEY),
    ):
        assert source is not None
        (keys / name).write_bytes(source.read_bytes())


def test_both_ends_come_up_from_their_folders_and_refuse_a_broker_until_it_is_mended(
    broker: SecureBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.link.mqtt.RECHECK_S", 0.2)
    pair(tmp_path / "device", tmp_path / "gateway")
    install(broker.device(load_device(tmp_path / "device").handle), tmp_path / "device")
    install(broker.gateway("gw0"), tmp_path / "gateway")
    good = (broker.folder / RULES).read_text()
    (broker.folder / RULES).write_text(good + "pattern readwrite #\n")
    broker.process.reload()

    async def comes_up(transport: MqttTransport) -> None:
        task = asyncio.create_task(transport.run())
        while "refused: this broker lets" not in transport.status:
            await asyncio.sleep(0.02)
        assert "--broker-check off" in transport.status
        (broker.folder / RULES).write_text(good)
        broker.process.reload()
        events = transport.events()
        assert await anext(events) == Connected()
        task.cancel()
        await asyncio.wait([task])

    async def main() -> None:
        await asyncio.sleep(0.3)
        await comes_up(device_transport(broker.url, tmp_path / "device", check="on"))
        (broker.folder / RULES).write_text(good + "pattern readwrite #\n")
        broker.process.reload()
        await asyncio.sleep(0.3)
        await comes_up(gateway_transport(broker.url, tmp_path / "gateway", check="on"))

    run(main)


def test_the_look_can_be_switched_off_and_is_on_for_brokers_elsewhere(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")
    keys = tmp_path / "device"

    def looks(url: str, check: str) -> bool:
        assert check in ("auto", "on", "off")
        return device_transport(url, keys, check=check).looks_first  # type: ignore[arg-type]

    assert [looks("mqtt://broker.example", mode) for mode in ("auto", "on", "off")] == [
        True,
        True,
        False,
    ]
    assert [looks("mqtt://127.0.0.1", mode) for mode in ("auto", "on", "off")] == [
        False,
        True,
        False,
    ]


def test_an_open_broker_is_refused_with_how_to_mend_it(tmp_path: Path) -> None:
    broker = BrokerProcess("mosquitto", tmp_path)
    broker.start()

    async def main() -> None:
        where = Access(url=BrokerUrl.parse(broker.url), tls=None)
        with pytest.raises(LinkError, match=r"access rules of docs/deploy/mosquitto\.md"):
            await check_broker(where, device_plan("home", ALICE))

    try:
        run(main)
    finally:
        broker.kill()


def test_a_device_that_vanishes_frees_its_generation_long_before_its_lease_ends(
    broker: SecureBroker, tmp_path: Path
) -> None:
    device_keys, gateway_keys = tmp_path / "device", tmp_path / "gateway"
    pair(device_keys, gateway_keys)
    install(broker.device(load_device(device_keys).handle), device_keys)
    install(broker.gateway("gw0"), gateway_keys)
    timing = replace(FAST, lease_s=300.0)
    freed = asyncio.Event()

    async def endless(request: InboundRequest) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"token"
                await asyncio.sleep(0.05)
        finally:
            freed.set()

    async def main() -> None:
        gateway = Gateway(
            gateway_keys, gateway_transport(broker.url, gateway_keys), endless, timing=timing
        )
        transport = device_transport(broker.url, device_keys)
        device = DeviceLink(device_keys, transport, timing=timing)
        serving, asking = asyncio.create_task(gateway.run()), asyncio.create_task(device.run())
        answer = device.request(b"prompt", deadline_s=30)
        for _ in range(3):
            assert await anext(answer) == b"token"
        assert transport._connection is not None
        transport._connection._socket._socket.shutdown(2)  # no goodbye
        asking.cancel()
        async with asyncio.timeout(10):
            await freed.wait()
        assert gateway.counters.expired == 1
        with pytest.raises(UnavailableError):
            async for _ in answer:
                pass
        serving.cancel()
        await asyncio.wait([serving, asking])
        await gateway.close()
        await device.close()

    run(main)
