"""The listener of the HTTP path: TLS of the fleet, and connections on which nothing happens."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from linkhttp import SOON, http_of, running, until

from tidegate.cloud.link_front import GatewaySettings
from tidegate.cloud.link_http_server import LinkHttpServer, LinkHttpSettings, PromptProtocol
from tidegate.errors import ConfigError
from tidegate.link.broker_tls import TlsFiles
from tidegate.link.certificate_facts import read_facts
from tidegate.link.certificates import issue_device, make_request
from tidegate.link.certificates_store import load_authority
from tidegate.link.fleet import pair
from tidegate.link.http_tls import HTTP_CERTIFICATE, HTTP_KEY, HttpTls
from tidegate.link.identity import load_device

HERE = LinkHttpSettings(host="127.0.0.1", port=0, timing=SOON)
NAMED = replace(HERE, names=("localhost", "127.0.0.1"))


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    pair(tmp_path / "device", tmp_path / "gateway")
    return tmp_path


def run(main: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 30))


@asynccontextmanager
async def serving(fleet: Path, settings: LinkHttpSettings) -> AsyncIterator[LinkHttpServer]:
    server = LinkHttpServer(fleet / "gateway", settings)
    try:
        async with running(server.hub.run):
            await until(lambda: server.hub.connected, "the hub runs")
            yield server
    finally:
        await server.close()


async def outcome(server: LinkHttpServer, device: Path, files: TlsFiles) -> str:
    """`connected`, or why not."""
    transport = http_of(server.url, device, files)
    async with running(transport.run):
        await until(lambda: "not connected yet" not in transport.status, "it has tried")
        return transport.status.rsplit(": ", 1)[1]


def certified(fleet: Path, *, by: Path) -> TlsFiles:
    """A client certificate for the device, of the authority in `by`."""
    request, key = make_request()
    handle = load_device(fleet / "device").handle
    pem = issue_device(load_authority(by).current, request, handle)
    folder = fleet / "certified"
    folder.mkdir()
    (folder / "cert.pem").write_bytes(pem)
    (folder / "key.pem").write_bytes(key)
    return TlsFiles(
        ca=fleet / "gateway" / "ca.pem", certificate=folder / "cert.pem", key=folder / "key.pem"
    )


def test_a_device_believes_the_fleets_authority_and_nobody_else(fleet: Path) -> None:
    async def main() -> None:
        async with serving(fleet, NAMED) as server:
            assert server.url.startswith("https://")
            ours = TlsFiles(ca=fleet / "gateway" / "ca.pem")
            assert await outcome(server, fleet / "device", ours) == "connected"
            assert "certificate" in await outcome(server, fleet / "device", TlsFiles())

    run(main)


def test_a_certificate_for_another_name_is_refused(fleet: Path) -> None:
    async def main() -> None:
        async with serving(fleet, replace(HERE, names=("elsewhere.example",))) as server:
            ours = TlsFiles(ca=fleet / "gateway" / "ca.pem")
            told = await outcome(server, fleet / "device", ours)
            assert "not valid for" in told

    run(main)


def test_client_certificates_are_asked_for_where_configured(fleet: Path, tmp_path: Path) -> None:
    pair(tmp_path / "stranger", tmp_path / "elsewhere")

    async def main() -> None:
        async with serving(fleet, replace(NAMED, client_certificates=True)) as server:
            ours = certified(fleet, by=fleet / "gateway")
            assert await outcome(server, fleet / "device", ours) == "connected"
            # What is said before the connection is reset does not always arrive.
            assert await outcome(server, fleet / "device", TlsFiles(ca=ours.ca)) != "connected"
            (fleet / "certified").rename(fleet / "before")
            foreign = replace(certified(fleet, by=tmp_path / "elsewhere"), ca=ours.ca)
            assert await outcome(server, fleet / "device", foreign) != "connected"

    run(main)


def test_a_certificate_is_renewed_when_it_is_due_without_a_new_listener(fleet: Path) -> None:
    now_s = 1_800_000_000.0
    gateway = fleet / "gateway"
    tls = HttpTls(gateway, names=("localhost",), wall_s=lambda: now_s)
    first = read_facts((gateway / HTTP_CERTIFICATE).read_bytes())
    assert not tls.renew()
    now_s += 300 * 86400
    assert tls.renew()
    assert read_facts((gateway / HTTP_CERTIFICATE).read_bytes()).naf_s > first.naf_s
    assert not tls.renew()
    assert (gateway / HTTP_KEY).stat().st_mode & 0o777 == 0o600


def test_beyond_this_machine_there_is_tls_unless_told_otherwise(fleet: Path) -> None:
    with pytest.raises(ConfigError, match="--link-http-plain"):
        LinkHttpServer(fleet / "gateway", replace(HERE, host="0.0.0.0"))
    with pytest.raises(ConfigError, match="client_certificates"):
        LinkHttpServer(fleet / "gateway", replace(HERE, client_certificates=True))

    async def main() -> None:
        async with serving(fleet, replace(HERE, host="0.0.0.0", plain=True)) as server:
            assert server.url.startswith("http://")

    run(main)


def test_a_certificate_that_lies_there_is_used(fleet: Path) -> None:
    HttpTls(fleet / "gateway", names=("localhost",))
    (fleet / "gateway" / "ca.key").unlink()

    async def main() -> None:
        async with serving(fleet, HERE) as server:
            assert server.url.startswith("https://")

    run(main)
    (fleet / "gateway" / HTTP_KEY).write_bytes(b"no key")
    with pytest.raises(ConfigError, match=r"http-cert\.pem"):
        LinkHttpServer(fleet / "gateway", HERE)


def test_a_connection_on_which_nothing_happens_is_closed(
    fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PromptProtocol, "look_every_s", 0.2)

    async def main() -> None:
        async with serving(fleet, HERE) as server:
            port = int(server.url.rsplit(":", 1)[1])
            loop = asyncio.get_running_loop()
            ask = b"GET /tidegate/1/challenge HTTP/1.1\r\nHost: x\r\n\r\n"
            for begun in (b"", b"GET /tidegate/1/chall", ask, ask + ask[:20]):
                with socket.create_connection(("127.0.0.1", port)) as slow:
                    slow.setblocking(False)
                    await loop.sock_sendall(slow, begun)
                    async with asyncio.timeout(3):
                        while await loop.sock_recv(slow, 4096):
                            pass

    run(main)


def test_one_address_has_only_so_many_connections_and_gets_them_back(fleet: Path) -> None:
    async def asked(port: int, connections: list[socket.socket]) -> bytes:
        """Whatever a new connection from here is answered; nothing when it is hung up on."""
        loop = asyncio.get_running_loop()
        one = socket.create_connection(("127.0.0.1", port))
        one.setblocking(False)
        connections.append(one)
        async with asyncio.timeout(3):
            try:
                await loop.sock_sendall(
                    one, b"GET /tidegate/1/challenge HTTP/1.1\r\nHost: x\r\n\r\n"
                )
                return await loop.sock_recv(one, 4096)
            except ConnectionError:
                return b""

    async def main() -> None:
        async with serving(fleet, replace(HERE, most_per_address=3)) as server:
            port = int(server.url.rsplit(":", 1)[1])
            held: list[socket.socket] = []
            answers = [await asked(port, held) for _ in range(5)]
            assert [bool(answer) for answer in answers] == [True, True, True, False, False]
            held[0].close()
            async with asyncio.timeout(3):
                while not await asked(port, held):
                    await asyncio.sleep(0.02)
            for one in held:
                one.close()

    run(main)


def test_a_stream_is_no_connection_on_which_nothing_happens(
    fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PromptProtocol, "look_every_s", 0.1)

    async def main() -> None:
        async with serving(fleet, HERE) as server:
            transport = http_of(server.url, fleet / "device")
            async with running(transport.run):
                await until(lambda: transport.connected, "it is connected")
                await asyncio.sleep(0.6)
                assert transport.connected

    run(main)


def test_a_gateway_has_a_broker_or_http_or_both(fleet: Path) -> None:
    with pytest.raises(ConfigError, match="--link-http"):
        GatewaySettings(broker=None, keys=fleet / "gateway")
    assert GatewaySettings(broker=None, keys=fleet / "gateway", http=HERE).http is HERE


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"names": ("gateway.example", "10.0.0.1")}, "https://gateway.example:{port}"),
        ({"names": ("::1",)}, "https://[::1]:{port}"),
        ({"url": "https://proxy.example/home/"}, "https://proxy.example:443/home"),
    ],
)
def test_adverts_name_what_devices_call_it(fleet: Path, change: dict[str, Any], told: str) -> None:
    async def main() -> None:
        async with serving(fleet, replace(HERE, **change)) as server:
            port = server.url.rsplit(":", 1)[1]
            assert server.public_url == told.format(port=port)

    run(main)


def test_an_address_for_adverts_without_tls_is_refused(fleet: Path) -> None:
    with pytest.raises(ConfigError, match="--link-http-plain"):
        LinkHttpServer(fleet / "gateway", replace(HERE, url="http://proxy.example"))
