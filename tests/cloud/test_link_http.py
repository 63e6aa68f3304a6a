"""The gateway's HTTP path on a loopback port: who gets in, who is sent away, and what it costs."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linkhttp import SOON, HttpSide, http_of, http_side, running, until
from linklab import FAST

from tidegate.errors import CapacityError, UnavailableError
from tidegate.link.device import DeviceLink
from tidegate.link.effects import InboundRequest
from tidegate.link.fleet import add_device, pair
from tidegate.link.gateway import Gateway
from tidegate.link.http_access import PATH, header, sign_send, sign_stream
from tidegate.link.http_frames import POST_BYTES, Frame, FrameSplitter, Kind
from tidegate.link.http_hub import HttpHub
from tidegate.link.http_stream import HubLimits
from tidegate.link.identity import DeviceIdentity, load_device
from tidegate.link.registry import DeviceRegistry
from tidegate.link.topics import GONE, Topics
from tidegate.link.transport import Connected, Disconnected, Message
from tidegate.link.wire import MAX_MESSAGE_BYTES

TOPICS = Topics("home")
HELLO = Frame(Kind.MESSAGE, b"hello").encode()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet")
    pair(folder / "device", folder / "gateway")
    gateway = folder / "gateway"
    for name in ("other", "revoked"):
        add_device(gateway / "fleet", folder / name, [gateway])
    return folder


@pytest.fixture
def device(fleet: Path) -> DeviceIdentity:
    return load_device(fleet / "device")


def run(main: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


@dataclass
class Caller:
    """A device that does what it likes."""

    client: httpx.AsyncClient
    identity: DeviceIdentity
    challenge: bytes = b""

    async def ask(self) -> bytes:
        """A fresh challenge."""
        answer = await self.client.get(f"{PATH}/challenge")
        assert answer.json()["gateway"] == "gw0"
        return bytes.fromhex(answer.json()["challenge"])

    @asynccontextmanager
    async def stream(self, said: str | None = None) -> AsyncIterator[httpx.Response]:
        self.challenge = await self.ask()
        claim = header(self.identity.handle, sign_stream(self.identity, "gw0", self.challenge))
        headers = {"Authorization": said or claim}
        async with self.client.stream("GET", f"{PATH}/stream", headers=headers) as response:
            yield response

    async def send(
        self, body: bytes = HELLO, *, number: int = 0, identity: DeviceIdentity | None = None
    ) -> httpx.Response:
        who = identity or self.identity
        statement = sign_send(who, "gw0", self.challenge, number=number, body=body)
        return await self.post(body, header(self.challenge.hex(), statement))

    async def post(self, body: bytes, said: str) -> httpx.Response:
        headers = {"Authorization": said}
        return await self.client.post(f"{PATH}/send", content=body, headers=headers)


@asynccontextmanager
async def caller(side: HttpSide, identity: DeviceIdentity) -> AsyncIterator[Caller]:
    async with httpx.AsyncClient(base_url=side.url, timeout=10, trust_env=False) as client:
        yield Caller(client, identity)


async def frames(response: httpx.Response) -> AsyncIterator[Frame]:
    splitter = FrameSplitter()
    async for data in response.aiter_raw():
        for frame in splitter.feed(data):
            yield frame


async def next_said(stream: AsyncIterator[Frame]) -> Frame:
    """The next frame that is no beat."""
    async for frame in stream:
        if frame.kind is not Kind.BEAT:
            return frame
    raise AssertionError("the stream ended")


@asynccontextmanager
async def serving(fleet: Path, limits: HubLimits | None = None) -> AsyncIterator[HttpSide]:
    async with http_side(fleet / "gateway", limits=limits) as side, running(side.hub.run):
        await until(lambda: side.hub.connected, "the hub runs")
        yield side


async def messages(hub: HttpHub, count: int) -> list[Message]:
    found: list[Message] = []
    async with asyncio.timeout(5):
        async for event in hub.events():
            if isinstance(event, Message):
                found.append(event)
            if len(found) == count:
                break
    return found


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, str(response.json()["error"]["code"])


def test_a_device_hears_a_beat_the_advert_and_its_answers(
    fleet: Path, device: DeviceIdentity
) -> None:
    async def main() -> None:
        async with serving(fleet) as side, caller(side, device) as one:
            await side.hub.publish(TOPICS.advert("gw0"), b"advert", retain=True)
            async with one.stream() as response:
                heard = frames(response)
                assert await anext(heard) == Frame(Kind.BEAT)
                assert await anext(heard) == Frame(Kind.ADVERT, b"advert")
                await side.hub.publish(TOPICS.response(device.handle), b"answer")
                assert await next_said(heard) == Frame(Kind.MESSAGE, b"answer")
                assert await anext(heard) == Frame(Kind.BEAT), "and then a beat at a time"
            await until(lambda: not side.hub.handles, "the device has left")

    run(main)


def test_what_a_device_sends_comes_on_its_topic_and_once(
    fleet: Path, device: DeviceIdentity
) -> None:
    async def main() -> None:
        async with serving(fleet) as side, caller(side, device) as one, one.stream():
            assert (await one.send(HELLO + HELLO, number=5)).status_code == 204
            topic = TOPICS.request("gw0", device.handle)
            assert await messages(side.hub, 2) == [Message(topic, b"hello")] * 2
            assert (await one.send(HELLO + HELLO, number=5)).status_code == 204
            assert (await one.send(Frame(Kind.MESSAGE, b"next").encode(), number=4)).is_success
            assert await messages(side.hub, 1) == [Message(topic, b"next")], "the replay is void"

    run(main)


def test_another_devices_handle_can_be_neither_read_nor_written(
    fleet: Path, device: DeviceIdentity
) -> None:
    other = load_device(fleet / "other")

    async def main() -> None:
        async with serving(fleet) as side, caller(side, device) as one, one.stream():
            async with caller(side, other) as thief:
                challenge = await thief.ask()
                for who in (other, replace(other, handle=device.handle)):
                    claim = header(device.handle, sign_stream(who, "gw0", challenge))
                    async with thief.stream(claim) as response:
                        await response.aread()
                        assert code(response) == (401, "identity_error")
                thief.challenge = one.challenge
                assert code(await thief.send())[0] == 401
            assert (await one.send()).status_code == 204

    run(main)


def test_a_claim_that_was_overheard_opens_nothing(fleet: Path, device: DeviceIdentity) -> None:
    async def main() -> None:
        async with serving(fleet) as side, caller(side, device) as one:
            async with one.stream():
                said = header(device.handle, sign_stream(device, "gw0", one.challenge))
                async with one.client.stream(
                    "GET", f"{PATH}/stream", headers={"Authorization": said}
                ) as again:
                    assert again.status_code == 401
                assert (await one.send()).status_code == 204, "and the first stream goes on"
            await until(lambda: not side.hub.handles, "the device has left")
            assert code(await one.send(number=1)) == (409, "unavailable")

    run(main)


def test_strangers_learn_nothing_from_what_they_are_told(
    fleet: Path, device: DeviceIdentity
) -> None:
    async def main() -> None:
        async with serving(fleet) as side, caller(side, load_device(fleet / "other")) as one:
            challenge = await one.ask()
            told = set()
            for handle in (device.handle, "f" * 32):
                said = header(handle, sign_stream(one.identity, "gw0", challenge))
                async with one.stream(said) as response:
                    told.add((response.status_code, await response.aread()))
            assert len(told) == 1

    run(main)


def test_a_newer_stream_of_a_device_ends_the_older(fleet: Path, device: DeviceIdentity) -> None:
    async def main() -> None:
        async with (
            serving(fleet) as side,
            caller(side, device) as one,
            caller(side, device) as two,
            one.stream() as first,
        ):
            heard = frames(first)
            await anext(heard)
            async with two.stream() as second:
                assert await next_said(heard) == Frame(Kind.BYE, b"replaced")
                assert [frame async for frame in heard] == []
                assert code(await one.send())[0] == 409
                assert (await two.send()).status_code == 204
                await side.hub.publish(TOPICS.response(device.handle), b"answer")
                assert (await next_said(frames(second))).data == b"answer"

    run(main)


def test_a_revoked_device_is_cut_off_and_stays_out(fleet: Path) -> None:
    revoked = load_device(fleet / "revoked")

    async def main() -> None:
        async with serving(fleet) as side, caller(side, revoked) as one:
            async with one.stream() as response:
                heard = frames(response)
                await anext(heard)
                registry = DeviceRegistry(fleet / "gateway" / "devices.sqlite")
                registry.revoke(revoked.device_id)
                registry.close()
                async with asyncio.timeout(3):
                    assert await next_said(heard) == Frame(Kind.BYE, b"device_revoked")
            async with one.stream() as response:
                await response.aread()
                assert code(response) == (403, "device_refused")

    run(main)


def test_a_revocation_holds_from_the_next_body_on(fleet: Path, tmp_path: Path) -> None:
    gateway = fleet / "gateway"
    add_device(gateway / "fleet", tmp_path / "late", [gateway])
    late = load_device(tmp_path / "late")

    async def main() -> None:
        timing = replace(SOON, recheck_s=3600.0)
        async with http_side(gateway, timing=timing) as side, running(side.hub.run):
            await until(lambda: side.hub.connected, "the hub runs")
            async with caller(side, late) as one, one.stream() as response:
                assert (await one.send()).status_code == 204
                registry = DeviceRegistry(gateway / "devices.sqlite")
                registry.revoke(late.device_id)
                registry.close()
                assert code(await one.send(number=1)) == (403, "device_refused")
                assert (await next_said(frames(response))).data == b"device_revoked"

    run(main)


def test_a_device_whose_time_is_over_is_told_that_and_not_that_it_was_revoked(
    fleet: Path, tmp_path: Path
) -> None:
    gateway = fleet / "gateway"
    add_device(gateway / "fleet", tmp_path / "ended", [gateway])
    ended = load_device(tmp_path / "ended")

    async def main() -> None:
        timing = replace(SOON, recheck_s=3600.0)
        async with http_side(gateway, timing=timing) as side, running(side.hub.run):
            await until(lambda: side.hub.connected, "the hub runs")
            async with caller(side, ended) as one, one.stream() as response:
                assert (await one.send()).status_code == 204
                with closing(DeviceRegistry(gateway / "devices.sqlite")) as registry:
                    record = registry.find(ended.device_id)
                    assert record is not None
                    registry.add(replace(record, expires_s=1))
                assert code(await one.send(number=1)) == (403, "device_refused")
                assert (await next_said(frames(response))).data == b"device_expired"

    run(main)


def test_a_reader_that_takes_nothing_holds_no_memory_and_is_hung_up_on(
    fleet: Path, device: DeviceIdentity
) -> None:
    limits = HubLimits(device_bytes=256 * 1024)

    async def main() -> None:
        async with serving(fleet, limits) as side, caller(side, device) as one:
            challenge = await one.ask()
            said = header(device.handle, sign_stream(device, "gw0", challenge))
            with closing(_connect(side)) as idle:
                idle.sendall(_get(f"{PATH}/stream", said))
                await until(lambda: side.hub.has(device.handle), "the stream is open")
                for _ in range(400):
                    await side.hub.publish(TOPICS.response(device.handle), bytes(64 * 1024))
                    await asyncio.sleep(0)
                    assert side.hub.waiting_bytes <= limits.device_bytes
                assert side.hub.lost > 100
                await until(lambda: not side.hub.handles, "it is hung up on", within_s=5)
                assert side.hub.waiting_bytes == 0

    run(main)


def test_all_readers_together_hold_no_more_than_the_bound(
    fleet: Path, device: DeviceIdentity
) -> None:
    other = load_device(fleet / "other")
    limits = HubLimits(device_bytes=1000, all_bytes=1500)

    async def main() -> None:
        hub = HttpHub("home", "gw0", limits=limits)
        async with running(hub.run):
            await until(lambda: hub.connected, "the hub runs")
            streams = [hub.open(device.handle, b"1"), hub.open(other.handle, b"2")]
            for _ in range(100):
                for handle in (device.handle, other.handle):
                    await hub.publish(TOPICS.response(handle), bytes(95))
            assert hub.waiting_bytes <= 1500
            assert streams[0].waiting_bytes <= 1000
            for stream in streams:
                hub.close(stream)
            assert hub.waiting_bytes == 0

    run(main)


def test_more_devices_than_allowed_are_turned_away(fleet: Path, device: DeviceIdentity) -> None:
    async def main() -> None:
        async with (
            serving(fleet, HubLimits(most_devices=1)) as side,
            caller(side, device) as one,
            one.stream(),
        ):
            async with caller(side, load_device(fleet / "other")) as two, two.stream() as full:
                await full.aread()
                assert code(full) == (503, "over_capacity")
            async with caller(side, device) as again, again.stream() as mine:
                assert mine.status_code == 200, "its own place is its own"

    run(main)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 204),
        (b"\x01", 400),
        (b"\x01\xff\xff\xff\xff", 400),
        (HELLO[:-1], 400),
        (Frame(Kind.BYE, b"x").encode(), 204),
        (bytes(POST_BYTES + 1), 413),
    ],
)
def test_bodies_that_are_none(
    fleet: Path, device: DeviceIdentity, body: bytes, status: int
) -> None:
    async def main() -> None:
        async with serving(fleet) as side, caller(side, device) as one, one.stream():
            assert (await one.send(body)).status_code == status
            assert side.hub.traffic.overflowed == 0
            assert (await one.send(number=1)).status_code == 204

    run(main)


def test_a_body_that_grows_beyond_the_bound_is_not_read_to_its_end(
    fleet: Path, device: DeviceIdentity
) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += 16384
            yield bytes(16384)

    async def main() -> None:
        async with serving(fleet) as side, caller(side, device) as one, one.stream():
            said = header(one.challenge.hex(), sign_stream(device, "gw0", one.challenge))
            try:
                response = await one.client.post(
                    f"{PATH}/send", content=endless(), headers={"Authorization": said}
                )
            except httpx.NetworkError:
                pass  # it was hung up on before it had said all
            else:
                assert response.status_code == 413
            assert sent < 100 * 1024 * 1024

    run(main)


def test_a_body_that_does_not_come_is_given_up(fleet: Path, device: DeviceIdentity) -> None:
    async def main() -> None:
        async with serving(fleet) as side, caller(side, device) as one, one.stream():
            statement = sign_send(device, "gw0", one.challenge, number=0, body=HELLO)
            said = header(one.challenge.hex(), statement)
            with closing(_connect(side)) as slow:
                slow.sendall(
                    f"POST {PATH}/send HTTP/1.1\r\nHost: x\r\nAuthorization: {said}\r\n"
                    "Content-Length: 10\r\n\r\n1".encode()
                )
                reader = asyncio.get_running_loop()
                slow.setblocking(False)
                async with asyncio.timeout(5):
                    answer = await reader.sock_recv(slow, 65536)
                assert b" 408 " in answer.split(b"\r\n")[0]

    run(main)


def test_paths_and_methods_that_are_none(fleet: Path, device: DeviceIdentity) -> None:
    async def main() -> None:
        async with serving(fleet) as side, caller(side, device) as one:
            for method, path in (("GET", "/"), ("POST", f"{PATH}/stream"), ("GET", f"{PATH}/send")):
                assert code(await one.client.request(method, path)) == (404, "not_found")
            for path in (f"{PATH}/stream", f"{PATH}/challenge/"):
                assert (await one.client.get(path)).status_code in (401, 404)

    run(main)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["challenge", "stream", "send", "x"]),
    st.sampled_from(["GET", "POST", "PUT"]),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=120),
    st.binary(max_size=300),
)
def test_whatever_strangers_say_is_refused_in_order(
    fuzzed: FuzzedApp, path: str, method: str, said: str, body: bytes
) -> None:
    status, answer = fuzzed.call(method, f"{PATH}/{path}", said, body)
    assert status in (200, 401, 404, 409)
    assert status != 200 or path == "challenge"
    assert json.loads(answer)


class FuzzedApp:
    """The app, called without a server."""

    def __init__(self, gateway: Path) -> None:
        self._runner = asyncio.Runner()
        self._side = http_side(gateway)
        self._app = self._runner.run(self._side.__aenter__()).app

    def call(self, method: str, path: str, said: str, body: bytes) -> tuple[int, bytes]:
        status, answer = 0, b""

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, object]) -> None:
            nonlocal status, answer
            if message["type"] == "http.response.start":
                assert isinstance(message["status"], int)
                status = message["status"]
            else:
                assert isinstance(message["body"], bytes)
                answer += message["body"]

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(b"authorization", f"Tidegate {said}".encode())],
        }
        self._runner.run(self._app(scope, receive, send))  # type: ignore[arg-type]
        return status, answer

    def close(self) -> None:
        self._runner.run(self._side.__aexit__(None, None, None))
        self._runner.close()


@pytest.fixture(scope="module")
def fuzzed(fleet: Path) -> Iterator[FuzzedApp]:
    app = FuzzedApp(fleet / "gateway")
    yield app
    app.close()


def _connect(side: HttpSide) -> socket.socket:
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plain.connect(("127.0.0.1", side.server.port))
    return plain


def _get(path: str, said: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {said}\r\n\r\n".encode()


def test_a_devices_transport_speaks_with_the_gateway(fleet: Path, device: DeviceIdentity) -> None:
    async def main() -> None:
        async with serving(fleet) as side:
            transport = http_of(side.url, fleet / "device")
            with pytest.raises(UnavailableError):
                await transport.publish(TOPICS.request("gw0", device.handle), b"x")
            await side.hub.publish(TOPICS.advert("gw0"), b"advert", retain=True)
            async with running(transport.run):
                heard = transport.events()
                assert await anext(heard) == Connected()
                assert transport.path == "http"
                assert await anext(heard) == Message(TOPICS.advert("gw0"), b"advert")
                sizes = [1, MAX_MESSAGE_BYTES, 70_000, 0] * 5
                for size in sizes:
                    await transport.publish(TOPICS.request("gw0", device.handle), bytes(size))
                found = await messages(side.hub, len(sizes))
                assert sorted(len(message.payload) for message in found) == sorted(sizes)
                await side.hub.publish(TOPICS.response(device.handle), b"answer")
                assert await anext(heard) == Message(TOPICS.response(device.handle), b"answer")
                with pytest.raises(UnavailableError):
                    await transport.publish(TOPICS.request("gw1", device.handle), b"x")
                side.hub.end([device.handle], "replaced")
                assert await anext(heard) == Disconnected()
                assert await anext(heard) == Connected(), "and comes back"
            assert not transport.connected
            await until(lambda: not side.hub.handles, "the device has left")

    run(main)


def test_what_was_said_last_is_still_sent(fleet: Path, device: DeviceIdentity) -> None:
    async def main() -> None:
        async with serving(fleet) as side:
            transport = http_of(side.url, fleet / "device")
            async with running(transport.run):
                assert await anext(transport.events()) == Connected()
                for number in range(20):
                    await transport.publish(TOPICS.request("gw0", device.handle), b"%d" % number)
            assert len(await messages(side.hub, 20)) == 20

    run(main)


def test_a_device_that_leaves_is_a_hint_and_one_that_comes_again_or_was_sent_away_is_none(
    fleet: Path, device: DeviceIdentity
) -> None:
    gone = Message(TOPICS.presence(device.handle), GONE)

    async def main() -> None:
        async with (
            serving(fleet) as side,
            caller(side, device) as one,
            caller(side, device) as two,
        ):
            async with one.stream() as first:
                heard_first = frames(first)
                await anext(heard_first)
                async with two.stream() as second:
                    heard_second = frames(second)
                    await anext(heard_second)
                    side.hub.end([device.handle], "device_revoked")
                    await until(lambda: not side.hub.handles, "it was sent away")
            async with one.stream() as third:
                heard_third = frames(third)
                await anext(heard_third)
                assert (await one.send()).status_code == 204
            await until(lambda: not side.hub.handles, "the device has left")
            assert (await messages(side.hub, 2))[1:] == [gone], "after its word, and only now"
            async with one.stream() as fourth:
                heard_fourth = frames(fourth)
                await anext(heard_fourth)
            assert await messages(side.hub, 1) == [gone]

    run(main)


def test_a_gateway_that_stops_lets_its_devices_take_what_is_ready(
    fleet: Path, device: DeviceIdentity
) -> None:
    async def main() -> None:
        async with (
            serving(fleet) as side,
            caller(side, device) as one,
            one.stream() as response,
        ):
            heard = frames(response)
            await anext(heard)
            for number in range(50):
                await side.hub.publish(TOPICS.response(device.handle), b"%d" % number)
            side.hub.end([device.handle], "gateway_stops", keep=True)
            said = [frame async for frame in heard if frame.kind is not Kind.BEAT]
            assert [frame.data for frame in said[:-1]] == [b"%d" % n for n in range(50)]
            assert said[-1] == Frame(Kind.BYE, b"gateway_stops")

    run(main)


def test_nobody_is_taken_while_the_gateway_does_not_run() -> None:
    hub = HttpHub("home", "gw0")
    with pytest.raises(UnavailableError):
        hub.open("a" * 32, b"1")


def test_the_bound_on_devices_is_told_as_lack_of_room() -> None:
    async def main() -> None:
        hub = HttpHub("home", "gw0", limits=HubLimits(most_devices=1))
        async with running(hub.run):
            await until(lambda: hub.connected, "the hub runs")
            stream = hub.open("a" * 32, b"1")
            with pytest.raises(CapacityError):
                hub.open("b" * 32, b"2")
            hub.close(stream)

    run(main)


@asynccontextmanager
async def recorded(port: int) -> AsyncIterator[tuple[str, bytearray]]:
    """A way to `port` on which somebody writes everything down, both directions."""
    heard = bytearray()
    tasks = set[asyncio.Task[None]]()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                heard.extend(data)
                writer.write(data)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        for pair_ in ((reader, back), (there, writer)):
            tasks.add(asyncio.create_task(pass_on(*pair_)))

    listening = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", heard
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_who_reads_everything_on_the_way_reads_no_word(fleet: Path, device: DeviceIdentity) -> None:
    prompt, answer = b"the confidential heron nests", b"under the northern sluice"

    async def handler(request: InboundRequest) -> AsyncIterator[bytes]:
        assert request.body == prompt
        yield answer

    async def main() -> None:
        async with http_side(fleet / "gateway") as side:
            gateway = Gateway(fleet / "gateway", side.hub, handler, timing=FAST)
            async with recorded(side.server.port) as (url, heard):
                link = DeviceLink(fleet / "device", http_of(url, fleet / "device"), timing=FAST)
                async with running(gateway.run, link.run):
                    said = [part async for part in link.request(prompt, deadline_s=20)]
                await link.close()
            await gateway.close()
            assert said == [answer]
            assert len(heard) > 1000
            for word in (*prompt.split(), *answer.split()):
                assert len(word) < 4 or word not in heard
            for secret in (device.device_id, device.device_id.hex().encode()):
                assert secret not in heard
            named = [line for line in heard.split(b"\r\n") if device.handle.encode() in line]
            assert all(line.startswith(b"Authorization: ") for line in named)
            assert len(named) == 1, "only who opens the stream is named, and in no URL"

    run(main)
