"""The link through real brokers in their own processes: killed, absent, and listening in."""

from __future__ import annotations

import asyncio
import datetime
import os
import resource
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from eavesdropping import eavesdropper
from linkbrokers import BrokerProcess
from linklab import FAST

from tidegate.errors import UnavailableError
from tidegate.link.device import DeviceLink
from tidegate.link.effects import InboundRequest
from tidegate.link.fleet import pair
from tidegate.link.gateway import Gateway, Handler
from tidegate.link.mqtt import MqttTransport
from tidegate.link.transport import Connected, Message
from tidegate.link.wire import MAX_MESSAGE_BYTES

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

PROMPT = b"a very secret prompt"
ANSWER = [b"plaintext token %d " % i for i in range(150)]
TIME_LIMIT_S = 90.0


@pytest.fixture(params=["mosquitto", "amqtt"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BrokerProcess]:
    broker = BrokerProcess(request.param, tmp_path)
    yield broker
    broker.kill()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    pair(tmp_path / "device", tmp_path / "gateway")
    return tmp_path


async def answer(request: InboundRequest) -> AsyncIterator[bytes]:
    assert request.body == PROMPT
    for token in ANSWER:
        yield token
        await asyncio.sleep(0.005)


class Gated:
    """A handler that waits at some payloads until it is let on: what comes between is in time."""

    def __init__(self, *stops: int) -> None:
        self.gates = {stop: asyncio.Event() for stop in stops}

    async def __call__(self, request: InboundRequest) -> AsyncIterator[bytes]:
        for number, token in enumerate(ANSWER):
            if number in self.gates:
                await self.gates[number].wait()
            yield token
            await asyncio.sleep(0.005)


@asynccontextmanager
async def linked(
    root: Path, url: str, handler: Handler = answer, *, mqtt5: bool = False
) -> AsyncIterator[DeviceLink]:
    """A device and a gateway, running, on the broker at `url`."""
    there, here = MqttTransport(url, mqtt5=mqtt5), MqttTransport(url, mqtt5=mqtt5)
    gateway = Gateway(root / "gateway", there, handler, timing=FAST)
    device = DeviceLink(root / "device", here, timing=FAST)
    tasks = [asyncio.create_task(gateway.run()), asyncio.create_task(device.run())]
    try:
        yield device
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await gateway.close()
        await device.close()


def run(main: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), TIME_LIMIT_S))


def test_a_subscriber_to_everything_sees_none_of_it(broker: BrokerProcess, root: Path) -> None:
    async def main() -> None:
        async with eavesdropper(broker.url) as heard, linked(root, broker.url) as device:
            got = [part async for part in device.request(PROMPT, deadline_s=30.0)]
            assert got == ANSWER
            await asyncio.sleep(0.3)
        kinds = {message.topic.split("/")[3] for message in heard}
        assert kinds == {"gw", "r"}
        everything = b"".join(message.topic.encode() + message.payload for message in heard)
        assert len(everything) > sum(map(len, ANSWER))
        for part in (b"secret", b"prompt", b"plaintext", b"token"):
            assert part not in everything

    broker.start()
    run(main)


def test_it_works_the_same_where_mqtt_5_is_wanted(broker: BrokerProcess, root: Path) -> None:
    async def main() -> None:
        async with linked(root, broker.url, mqtt5=True) as device:
            got = [part async for part in device.request(PROMPT, deadline_s=30.0)]
            assert got == ANSWER

    broker.start()
    run(main)


def test_a_broker_killed_in_mid_answer_costs_time_only(broker: BrokerProcess, root: Path) -> None:
    async def main() -> None:
        handler = Gated(40)
        async with linked(root, broker.url, handler) as device:
            got: list[bytes] = []
            async for part in device.request(PROMPT, deadline_s=60.0):
                got.append(part)
                if len(got) == 40:
                    await asyncio.to_thread(broker.kill)
                    assert device.counters.completed == 0, "it was killed in mid-answer"
                    await asyncio.to_thread(broker.start)
                    handler.gates[40].set()
            assert got == ANSWER
            assert await device.pending() == ()

    broker.start()
    run(main)


def test_a_broker_that_keeps_dying_costs_time_only(broker: BrokerProcess, root: Path) -> None:
    async def main() -> None:
        handler = Gated(20, 50, 100)
        async with linked(root, broker.url, handler) as device:
            got: list[bytes] = []
            async for part in device.request(PROMPT, deadline_s=60.0):
                got.append(part)
                if len(got) in handler.gates:
                    await asyncio.to_thread(broker.kill)
                    assert device.counters.completed == 0, "it was killed in mid-answer"
                    await asyncio.sleep(0.3)
                    await asyncio.to_thread(broker.start)
                    handler.gates[len(got)].set()
            assert got == ANSWER

    broker.start()
    run(main)


def test_a_broker_that_hangs_in_mid_answer_is_left_and_costs_time_only(
    broker: BrokerProcess, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.link.mqtt_connection.ACKNOWLEDGE_TIMEOUT_S", 1.0)

    async def main() -> None:
        handler = Gated(40)
        async with linked(root, broker.url, handler) as device:
            got: list[bytes] = []
            async for part in device.request(PROMPT, deadline_s=60.0):
                got.append(part)
                if len(got) == 40:
                    broker.pause()
                    handler.gates[40].set()
                    while device.connected:
                        await asyncio.sleep(0.05)
                    await asyncio.to_thread(broker.kill)
                    await asyncio.to_thread(broker.start)
            assert got == ANSWER

    broker.start()
    run(main)


def test_without_a_broker_callers_hear_so_and_the_link_recovers(
    broker: BrokerProcess, root: Path
) -> None:
    async def main() -> None:
        async with linked(root, broker.url) as device:
            with pytest.raises(UnavailableError, match=r"no gateway.*connection refused"):
                await anext(device.request(PROMPT, deadline_s=30.0))
            assert not device.connected
            await asyncio.to_thread(broker.start)
            while not await device.gateways():
                await asyncio.sleep(0.05)
            got = [part async for part in device.request(PROMPT, deadline_s=30.0)]
            assert got == ANSWER

    run(main)


@pytest.fixture
def tls_broker(tmp_path: Path) -> Iterator[tuple[BrokerProcess, Path]]:
    """Mosquitto with a certificate that it signed itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (tmp_path / "ca.pem").write_bytes(certificate.public_bytes(pem))
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    # mosquitto gives up root's rights before it reads the key.
    for path in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(path.stat().st_mode | 0o055)
    (tmp_path / "key.pem").chmod(0o644)
    broker = BrokerProcess("mosquitto", tmp_path)
    with (tmp_path / "mosquitto.conf").open("a") as config:
        config.write(f"certfile {tmp_path}/ca.pem\nkeyfile {tmp_path}/key.pem\n")
    broker.start()
    yield broker, tmp_path / "ca.pem"
    broker.kill()


def test_it_works_over_tls_and_only_with_a_broker_that_is_who_it_says(
    tls_broker: tuple[BrokerProcess, Path],
) -> None:
    broker, ca_file = tls_broker

    async def main() -> None:
        for host, ca, said in (
            ("localhost", None, "certificate"),
            ("127.0.0.1", ca_file, "certificate"),
        ):
            stranger = MqttTransport(f"mqtts://{host}:{broker.port}", ca_file=ca)
            task = asyncio.create_task(stranger.run())
            while said not in stranger.status:
                await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.wait([task])
        transport = MqttTransport(f"mqtts://localhost:{broker.port}", ca_file=ca_file)
        transport.subscribe("a")
        task = asyncio.create_task(transport.run())
        events = transport.events()
        assert await anext(events) == Connected()
        for size in (0, 10, MAX_MESSAGE_BYTES):
            await transport.publish("a", bytes(size))
            assert await anext(events) == Message("a", bytes(size))
        task.cancel()
        await asyncio.wait([task])

    run(main)


def test_a_file_descriptor_beyond_what_select_can_hold_works(
    broker: BrokerProcess, root: Path
) -> None:
    async def main() -> None:
        async with linked(root, broker.url) as device:
            got = [part async for part in device.request(PROMPT, deadline_s=30.0)]
            assert got == ANSWER

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("this process may not open 1024 files")
    broker.start()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    try:
        run(main)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
