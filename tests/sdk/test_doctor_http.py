"""`tidegate doctor link` over HTTP: each mistake is made for real, and named."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from linkhttp import OFFER, SOON, running, tokens
from linklab import FAST

from tidegate.cli.doctor_link_checks import Finding
from tidegate.cli.doctor_link_http import examine_http
from tidegate.cli.main import main as cli
from tidegate.cloud.link_http_server import LinkHttpServer, LinkHttpSettings
from tidegate.errors import ConfigError
from tidegate.link.certificates_store import BROKER_CA
from tidegate.link.fleet import pair
from tidegate.link.gateway import Gateway
from tidegate.link.keyfiles import FolderLock


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    pair(tmp_path / "device", tmp_path / "gateway")
    roots = (tmp_path / "gateway" / "ca.pem").read_bytes()
    (tmp_path / "device" / BROKER_CA).write_bytes(roots)
    return tmp_path


def run(main: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


@asynccontextmanager
async def gateway(fleet: Path, *names: str) -> AsyncIterator[str]:
    settings = LinkHttpSettings(host="127.0.0.1", port=0, names=names, timing=SOON)
    server = LinkHttpServer(fleet / "gateway", settings)
    end = Gateway(fleet / "gateway", server.hub, tokens, models=lambda: (OFFER,), timing=FAST)
    async with running(end.run):
        await asyncio.sleep(0.1)
        yield server.url
    await end.close()
    await server.close()


async def look(url: str, keys: Path) -> list[Finding]:
    return await examine_http([url], keys, plain=False)


def test_where_all_is_well_it_says_so_and_measures_a_round_trip(fleet: Path) -> None:
    async def main() -> None:
        async with gateway(fleet, "127.0.0.1") as url:
            findings = await look(url, fleet / "device")
            assert [(one.check, one.state) for one in findings] == [
                ("http", "ok"),
                ("http trip", "ok"),
            ], findings
            assert "is gw0" in findings[0].what

    run(main)


def test_a_certificate_for_another_name_and_roots_that_are_missing_are_told(fleet: Path) -> None:
    async def main() -> None:
        async with gateway(fleet, "elsewhere.example") as url:
            found, trip = await look(url, fleet / "device")
            assert found.state == "failed"
            assert "--link-http-name" in found.mend
            assert trip.state == "skipped"
            (fleet / "device" / BROKER_CA).unlink()
            found, _ = await look(url, fleet / "device")
            assert "broker-ca.pem" in found.mend, found

    run(main)


def test_a_port_on_which_nobody_listens_is_told(fleet: Path) -> None:
    async def main() -> None:
        found, _ = await look("http://127.0.0.1:1", fleet / "device")
        assert found.state == "failed"
        assert "--link-http" in found.mend, found

    run(main)


def test_a_stream_of_a_running_daemon_is_left_alone(fleet: Path) -> None:
    async def main() -> None:
        async with gateway(fleet) as url:
            lock = FolderLock(fleet / "device")
            found, trip = await look(url, fleet / "device")
            lock.release()
            assert (found.state, trip.state) == ("ok", "skipped")
            assert "GET /status" in trip.what

    run(main)


def test_a_gateways_folder_has_no_such_path(fleet: Path) -> None:
    async def main() -> None:
        (found,) = await look("http://127.0.0.1:1", fleet / "gateway")
        assert found.state == "failed"
        with pytest.raises(ConfigError, match="--link-http-plain"):
            await look("http://gateway.example", fleet / "device")

    run(main)


def test_the_command_looks_at_http_alone(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = str(fleet / "device")
    arguments = ["--link-http", "http://127.0.0.1:1", "--keys", keys, "--json"]
    assert cli(["doctor", "link", *arguments]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert [one["check"] for one in findings] == ["http", "http trip"]
    assert cli(["doctor", "link", "--keys", keys]) == 1
    assert "--link" in capsys.readouterr().err
