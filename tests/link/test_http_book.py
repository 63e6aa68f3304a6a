"""What gateways say of their addresses: kept, followed, and not believed any further."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from linkhttp import http_of, http_side, running, until
from linklab import FAST
from linkpair import ScriptedCloud

from tidegate.errors import ConfigError
from tidegate.link.device import DeviceLink
from tidegate.link.device_views import GatewayView
from tidegate.link.fleet import pair
from tidegate.link.gateway import Gateway
from tidegate.link.http_book import FILE, MOST_KNOWN, HttpBook
from tidegate.link.http_device import HttpTransport
from tidegate.link.identity import load_device
from tidegate.link.memory import MemoryBroker, MemoryTransport
from tidegate.link.paths_access import device_way


def view(gateway: str, http: str) -> GatewayView:
    return GatewayView(gateway_id=gateway, models=(), load=0.0, age_s=0.0, http=http)


def test_an_address_is_kept_changed_and_forgotten(tmp_path: Path) -> None:
    book = HttpBook(tmp_path)
    assert book.urls == ()
    assert book.hear([view("gw0", "https://a.example"), view("gw1", "")])
    assert not book.hear([view("gw0", "https://a.example")])
    assert not book.hear([]), "a gateway that is away keeps its address"
    assert HttpBook(tmp_path).urls == ("https://a.example",)
    assert book.hear([view("gw0", "https://b.example")])
    assert HttpBook(tmp_path).urls == ("https://b.example",)
    assert book.hear([view("gw0", "")])
    assert HttpBook(tmp_path).urls == ()


@pytest.mark.parametrize(
    "url", ["http://a.example", "http://127.0.0.1:1", "ftp://a", "https://", "x", "https://u:p@a"]
)
def test_what_is_no_address_or_without_tls_is_not_taken(tmp_path: Path, url: str) -> None:
    assert not HttpBook(tmp_path).hear([view("gw0", url)])


def test_without_tls_is_taken_where_that_was_asked_for(tmp_path: Path) -> None:
    book = HttpBook(tmp_path, plain=True)
    assert book.hear([view("gw0", "http://a.example")])
    assert HttpBook(tmp_path).urls == (), "and not by whoever has not asked"


def test_no_more_than_a_few_are_kept_the_last_heard_ones(tmp_path: Path) -> None:
    book = HttpBook(tmp_path)
    book.hear([view(f"gw{number}", f"https://g{number}.example") for number in range(20)])
    assert book.urls == tuple(f"https://g{number}.example" for number in range(12, 20))
    assert len(book.urls) == MOST_KNOWN


@pytest.mark.parametrize("text", ["", "[]", "{", '{"../x": "https://a"}', "[" * 5000, "\xff"])
def test_a_damaged_file_counts_as_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text, encoding="latin-1")
    book = HttpBook(tmp_path)
    assert book.urls == ()
    assert book.hear([view("gw0", "https://a.example")])


def test_a_signed_advert_carries_the_address_to_the_device(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")

    async def main() -> None:
        broker = MemoryBroker()
        gateway = Gateway(
            tmp_path / "gateway",
            MemoryTransport(broker),
            ScriptedCloud(()),
            timing=FAST,
            http="https://a.example",
        )
        device = DeviceLink(tmp_path / "device", MemoryTransport(broker), timing=FAST)
        book, learned = HttpBook(tmp_path / "device"), Learner()
        async with running(gateway.run, device.run, lambda: book.keep(device, learned)):
            await until(lambda: learned.urls == ("https://a.example",), "it is learned", within_s=8)
        await gateway.close()
        await device.close()

    asyncio.run(main())


class Learner:
    urls: Sequence[str] = ()

    def learn(self, urls: Sequence[str]) -> None:
        self.urls = tuple(urls)


def test_a_transport_follows_what_it_learns(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")

    async def main() -> None:
        async with http_side(tmp_path / "gateway") as side, running(side.hub.run):
            transport = HttpTransport([], lambda: load_device(tmp_path / "device"))
            async with running(transport.run):
                assert transport.status == ""
                transport.learn([side.url])
                await until(lambda: transport.connected, "what was learned is used")
                transport.learn([side.url, side.url, "https://a.example"])
                assert transport.connected, "what stays is left alone"
                assert transport.status.count("gateway http") == 2
                transport.learn([])
                await until(lambda: not side.hub.handles, "what was forgotten is left")
            given = http_of(side.url, tmp_path / "device")
            given.learn([f"https://g{number}.example" for number in range(20)])
            assert given.status.count("gateway http") == 8
            given.learn([])
            assert side.url in given.status

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_way_has_a_broker_or_a_url_that_was_given_or_learned(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")
    keys = tmp_path / "device"
    with pytest.raises(ConfigError, match="--link-http"):
        device_way(None, keys)
    HttpBook(keys).hear([view("gw0", "https://a.example")])
    assert "a.example" in device_way(None, keys).transport.status
    with pytest.raises(ConfigError, match="--link-http"):
        device_way(None, keys, learn=False)
    both = device_way("mqtt://127.0.0.1:1", keys)
    assert "a.example" in both.transport.status
    only = device_way("mqtt://127.0.0.1:1", keys, learn=False)
    assert "a.example" not in only.transport.status
