"""HTTPS whose certificates are exchanged while it serves, and clients that show theirs."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from echobackend import EchoBackend
from keyedapp import HELLO, keyed_access, keyed_app
from pemfiles import Authority

from tidegate.api.hangup import hear
from tidegate.api.http import create_app
from tidegate.api.server import BoundServer
from tidegate.api.settings import surface_for
from tidegate.api.tls import ServerTls, TlsFiles, client_name
from tidegate.cloud.access import written_down
from tidegate.cloud.key_rules import KeyRules
from tidegate.errors import ConfigError


@asynccontextmanager
async def serving_tls(tls: ServerTls, app: object = None) -> AsyncIterator[str]:
    """The echo over HTTPS while the block runs; gives its URL."""
    app = app or create_app(EchoBackend())
    server = BoundServer(app, "127.0.0.1", 0, drain_s=1, tls=tls.context)  # type: ignore[arg-type]
    task = asyncio.create_task(server.run())
    try:
        yield server.url
    finally:
        server.drain()
        await task


async def get(url: str, context: ssl.SSLContext, path: str = "/health") -> int:
    """The status of a request on a connection of its own."""
    async with httpx.AsyncClient(verify=context) as client:
        return (await client.get(url + path)).status_code


async def serial_of(url: str, context: ssl.SSLContext) -> str:
    """Which certificate a new connection is shown."""
    _, _, address = url.partition("//")
    host, _, port = address.partition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    serial = str(writer.get_extra_info("peercert")["serialNumber"])
    writer.close()
    await writer.wait_closed()
    return serial


def overwrite(files: TlsFiles, other: TlsFiles) -> None:
    """Put another certificate and key where the old ones are."""
    shutil.copy(other.certificate, files.certificate)
    shutil.copy(other.key, files.key)


def test_a_new_certificate_is_taken_up_and_no_connection_notices(tmp_path: Path) -> None:
    ca = Authority.make(tmp_path)
    files = ca.certify("server")
    tls = ServerTls(files)

    async def main() -> None:
        async with serving_tls(tls) as url, httpx.AsyncClient(verify=ca.trusting()) as kept:
            assert (await kept.get(f"{url}/health")).status_code == 200
            before = await serial_of(url, ca.trusting())
            assert not tls.reload()  # nothing changed
            overwrite(files, ca.certify("next"))
            assert tls.reload()
            assert await serial_of(url, ca.trusting()) != before
            answer = await kept.get(f"{url}/health")
            assert answer.status_code == 200
            stream = answer.extensions["network_stream"].get_extra_info("ssl_object")
            shown = stream.getpeercert()["serialNumber"]
            assert shown == before, "the same connection as before"

    asyncio.run(main())


def test_half_of_a_new_pair_is_refused_and_the_old_one_serves_on(tmp_path: Path) -> None:
    ca = Authority.make(tmp_path)
    files, following = ca.certify("server"), ca.certify("next")
    tls = ServerTls(files)

    async def main() -> None:
        async with serving_tls(tls) as url:
            before = await serial_of(url, ca.trusting())
            shutil.copy(following.certificate, files.certificate)
            with pytest.raises(ConfigError, match="tls-key"):
                tls.reload()
            assert await serial_of(url, ca.trusting()) == before
            assert not tls.reload()  # said once
            shutil.copy(following.key, files.key)
            assert tls.reload()
            assert await serial_of(url, ca.trusting()) != before

    asyncio.run(main())


def test_a_certificate_that_begins_later_is_taken_up_when_it_does(tmp_path: Path) -> None:
    ca = Authority.make(tmp_path)
    files, now_s = ca.certify("server"), time.time()
    tls = ServerTls(files, wall_s=lambda: now_s)
    ends_s = tls.expires_s
    overwrite(files, ca.certify("next", days=(1, 90)))
    with pytest.raises(ConfigError, match="tls-cert"):
        tls.reload()
    assert not tls.reload()  # said once
    assert tls.expires_s == ends_s
    now_s += 2 * 86_400
    assert tls.reload()
    assert tls.expires_s > ends_s
    assert not tls.reload()


def test_files_that_could_not_be_opened_once_are_opened_the_next_time(tmp_path: Path) -> None:
    ca = Authority.make(tmp_path)
    files = ca.certify("server")
    tls = ServerTls(files)
    overwrite(files, ca.certify("next"))
    lowest, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, highest))  # no descriptor is left
    try:
        with pytest.raises(ConfigError, match="too many open files"):
            tls.reload()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, highest))
    assert tls.reload()


def test_a_hangup_looks_at_the_files_at_once(tmp_path: Path) -> None:
    ca = Authority.make(tmp_path)
    files = ca.certify("server")
    tls = ServerTls(files)
    ends_s = tls.expires_s

    async def main() -> None:
        task = asyncio.create_task(tls.run())
        await asyncio.sleep(0.05)
        overwrite(files, ca.certify("next", days=(-1, 90)))
        hear()  # as SIGHUP does; a real one is sent in tests/system/test_tls.py
        async with asyncio.timeout(4):  # less than until it looks by itself
            while tls.expires_s == ends_s:
                await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    assert tls.expires_s == pytest.approx(time.time() + 90 * 86_400, abs=120)


@pytest.mark.parametrize(
    ("version", "mutual", "passes"),
    [
        (ssl.TLSVersion.TLSv1_2, False, True),
        (ssl.TLSVersion.TLSv1_3, False, True),
        (ssl.TLSVersion.TLSv1_2, True, False),
        (ssl.TLSVersion.TLSv1_3, True, True),
    ],
)
def test_versions_before_1_2_are_none_and_before_1_3_show_no_client(
    tmp_path: Path, version: ssl.TLSVersion, mutual: bool, passes: bool
) -> None:
    ca = Authority.make(tmp_path)
    tls = ServerTls(replace(ca.certify("server"), client_ca=ca.path if mutual else None))
    assert tls.context.minimum_version >= ssl.TLSVersion.TLSv1_2
    context = ca.trusting(ca.certify("client"))
    context.maximum_version = version

    async def main() -> None:
        async with serving_tls(tls) as url:
            if passes:
                assert await get(url, context) == 200
            else:
                with pytest.raises(httpx.TransportError):
                    await get(url, context)

    asyncio.run(main())


def test_without_a_certificate_of_the_authority_nobody_gets_in(tmp_path: Path) -> None:
    ca, other = Authority.make(tmp_path), Authority.make(tmp_path, "other")
    tls = ServerTls(replace(ca.certify("server"), client_ca=ca.path))
    strangers = (None, other.certify("stranger"), ca.certify("late", days=(-5, -1)))

    async def main() -> None:
        async with serving_tls(tls) as url:
            assert await get(url, ca.trusting(ca.certify("known"))) == 200
            for stranger in strangers:
                with pytest.raises(httpx.TransportError):
                    await get(url, ca.trusting(stranger))

    asyncio.run(main())


def test_an_authority_that_was_taken_away_lets_nobody_in_any_more(tmp_path: Path) -> None:
    ca, other = Authority.make(tmp_path), Authority.make(tmp_path, "other")
    roots = tmp_path / "roots.pem"
    shutil.copy(ca.path, roots)
    tls = ServerTls(replace(ca.certify("server"), client_ca=roots))
    old, new = ca.trusting(ca.certify("old")), ca.trusting(other.certify("new"))

    async def main() -> None:
        async with serving_tls(tls) as url:
            assert await get(url, old) == 200
            with pytest.raises(httpx.TransportError):
                await get(url, new)
            shutil.copy(other.path, roots)
            assert tls.reload()
            assert await get(url, new) == 200
            with pytest.raises(httpx.TransportError):
                await get(url, old)  # the very context that has been here: nothing is resumed

    asyncio.run(main())


def garbage(files: TlsFiles, ca: Authority) -> TlsFiles:
    files.certificate.write_text("-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n")
    return files


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda files, ca: replace(files, certificate=ca.folder / "no"), "tls-cert.*no such file"),
        (lambda files, ca: replace(files, key=ca.folder), "tls-key.*is a directory"),
        (garbage, "tls-cert.*a PEM certificate"),
        (lambda files, ca: replace(files, certificate=files.key), "tls-cert.*a PEM certificate"),
        (lambda files, ca: replace(files, key=ca.certify("other").key), "tls-key.*the PEM key of"),
        (lambda files, ca: ca.certify("s", passphrase=b"x"), "tls-key.*without a passphrase"),
        (lambda files, ca: ca.certify("s", days=(-9, -1)), "tls-cert.*valid now, not only from"),
        (lambda files, ca: ca.certify("s", days=(1, 9)), "tls-cert.*valid now, not only from"),
        (lambda files, ca: replace(files, client_ca=files.key), "tls-client-ca.*PEM certificates"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_name(
    tmp_path: Path, spoil: Callable[[TlsFiles, Authority], TlsFiles], says: str
) -> None:
    ca = Authority.make(tmp_path)
    with pytest.raises(ConfigError, match=says):
        ServerTls(spoil(ca.certify("server"), ca))


def test_a_key_that_others_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = Authority.make(tmp_path).certify("server")
    ServerTls(files)
    assert caplog.text == ""
    files.key.chmod(0o644)
    ServerTls(files)
    assert "can be read by others" in caplog.text


def test_a_certificate_names_its_client() -> None:
    subject = ((("countryName", "NO"),), (("commonName", "team-a"),))
    assert client_name({"subject": subject}) == "team-a"
    assert client_name({"subject": ((("countryName", "NO"),),)}) is None
    assert client_name(None) is None


def test_beyond_loopback_clients_certificates_do_instead_of_keys() -> None:
    assert surface_for("0.0.0.0", key_hashes=(), mutual_tls=True).authorise is None
    with pytest.raises(ConfigError, match="listen"):
        surface_for("0.0.0.0", key_hashes=())


@pytest.mark.parametrize("client_keys", [True, False])
def test_a_certificate_stands_for_the_key_of_its_name_where_that_is_wanted(
    tmp_path: Path, client_keys: bool
) -> None:
    ca = Authority.make(tmp_path)
    tls = ServerTls(replace(ca.certify("server"), client_ca=ca.path))

    async def main() -> list[tuple[int, str]]:
        access = keyed_access(tmp_path / "state", client_keys=client_keys)
        access.keys.add("team-a", KeyRules(scopes=("chat",)), now_s=0)
        revoked, _ = access.keys.add("gone", KeyRules(), now_s=0)
        access.keys.revoke(revoked.id, now_s=1)
        told = []
        async with written_down(access), serving_tls(tls, keyed_app(access, EchoBackend())) as url:
            for name, token in (("team-a", None), ("team-a", "wrong"), ("gone", None), ("x", None)):
                context = ca.trusting(ca.certify(name))
                heads = {} if token is None else {"Authorization": f"Bearer {token}"}
                async with httpx.AsyncClient(verify=context, headers=heads) as client:
                    answer = await client.post(f"{url}/v1/chat/completions", json=HELLO)
                    error = answer.json().get("error", {"code": ""})
                    told.append((answer.status_code, error["code"]))
        return told

    refused = (401, "invalid_api_key")
    expected = [(200, ""), refused, (401, "key_revoked"), refused]
    assert asyncio.run(main()) == (expected if client_keys else [refused] * 4)
    lines = (tmp_path / "state" / "audit.jsonl").read_text().splitlines()
    assert all('"client":"' in line for line in lines)


HANGUPS = """
import asyncio, os, signal
from tidegate.api.hangup import on_hangup

async def hang_up(heard, wanted):
    os.kill(os.getpid(), signal.SIGHUP)
    async with asyncio.timeout(20):
        while len(heard) < wanted:
            await asyncio.sleep(0.01)

async def main():
    heard = []
    with on_hangup(lambda: heard.append("one")):
        with on_hangup(lambda: heard.append("two")):
            await hang_up(heard, 2)
        await hang_up(heard, 3)
    await hang_up(heard, 3)  # nobody listens, and nobody is ended
    print(*heard)

asyncio.run(main())
"""


def test_everyone_who_waits_for_a_hangup_hears_it_and_nobody_is_ended_by_one() -> None:
    # In a process of its own: libraries of other tests may have handlers of theirs in this one.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", HANGUPS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["one", "two", "one"]), done.stderr
