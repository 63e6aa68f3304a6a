"""`tidegate doctor link` against a real mosquitto: each mistake is made for real, and named."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from linkbrokers import SecureBroker, free_port
from linklab import FAST

from tidegate.cli.doctor_link_checks import Finding, examine
from tidegate.cli.main import main
from tidegate.link.broker_access import gateway_transport
from tidegate.link.broker_tls import TlsFiles, tls_context
from tidegate.link.broker_url import BrokerUrl
from tidegate.link.certificates import issue_server
from tidegate.link.certificates_store import BROKER_CA, BROKER_CERTIFICATE, BROKER_KEY
from tidegate.link.device import DeviceLink
from tidegate.link.effects import InboundRequest
from tidegate.link.fleet import pair, revoke_gateway
from tidegate.link.gateway import Gateway
from tidegate.link.gateway_keys import GatewayKeys
from tidegate.link.gateway_revocation import import_revocations
from tidegate.link.identity import load_device, load_gateway
from tidegate.link.memory import MemoryBroker, MemoryTransport
from tidegate.link.mosquitto import RULES
from tidegate.link.mqtt_connection import Access, Connection
from tidegate.link.prekeys import ModelOffer, PrekeyStore
from tidegate.link.registry import DeviceRegistry
from tidegate.link.topics import Topics
from tidegate.link.transport import EventQueue

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
TOPICS = Topics("home")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A broker in production shape, a device and a gateway with good certificates for it."""

    broker: SecureBroker
    device: Path
    gateway: Path
    handle: str


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    broker = SecureBroker(tmp_path / "secure")
    broker.process.start()
    device, gateway = tmp_path / "device", tmp_path / "gateway"
    pair(device, gateway)
    handle = load_device(device).handle
    install(broker.device(handle), device)
    install(broker.gateway("gw0"), gateway)
    yield Place(broker=broker, device=device, gateway=gateway, handle=handle)
    broker.process.kill()


def install(files: TlsFiles, keys: Path) -> None:
    for source, name in (
        (files.ca, BROKER_CA),
        (files.certificate, BROKER_CERTIFICATE),
        (files.key, BROKER_KEY),
    ):
        assert source is not None
        (keys / name).write_bytes(source.read_bytes())
        (keys / name).chmod(0o600)


def look(url: str, keys: Path, *, wait_s: float = 0.5) -> dict[str, Finding]:
    findings = asyncio.run(asyncio.wait_for(examine(url, keys, wait_s=wait_s), 60))
    return {finding.check: finding for finding in findings}


def check_failed(found: dict[str, Finding], check: str, what: str, mend: str) -> None:
    """`check` failed, says what and how to mend it; what came before is fine, the rest listed."""
    finding = found[check]
    assert (finding.state, what in finding.what) == ("failed", True), finding
    assert mend in finding.mend, finding
    names = list(found)
    before, after = names[: names.index(check)], names[names.index(check) + 1 :]
    assert all(found[name].state in ("ok", "warning") for name in before)
    if check != "topics":
        assert all(found[name].state == "skipped" for name in after)


async def answer(request: InboundRequest) -> AsyncIterator[bytes]:
    yield b"anything"


@asynccontextmanager
async def running_gateway(place: Place) -> AsyncIterator[None]:
    transport = gateway_transport(place.broker.url, place.gateway, check="on")
    offer = ModelOffer(id="big", context_tokens=512)
    gateway = Gateway(place.gateway, transport, answer, models=lambda: (offer,), timing=FAST)
    task = asyncio.create_task(gateway.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        await gateway.close()


async def leave_advert(place: Place, *, off_s: float = 0.0, prekey_age_s: float = 0.0) -> None:
    """What a gateway whose clock is `off_s` ahead would have said a moment ago."""
    now_s = time.time() + off_s
    identity = load_gateway(place.gateway)
    prekeys = PrekeyStore(place.gateway / f"prekeys-{off_s}-{prekey_age_s}.json")
    prekeys.rotate(now_s - prekey_age_s)
    registry = DeviceRegistry(place.gateway / "devices.sqlite")
    keys = GatewayKeys(identity=identity, prekeys=prekeys, registry=registry, wall_s=lambda: now_s)
    advert = keys.advert(version=int(now_s * 1000), models=(), load=0.0, valid_s=60)
    registry.close()
    files = TlsFiles.in_folder(place.gateway)
    where = Access(url=BrokerUrl.parse(place.broker.url), tls=tls_context(files))
    connection = Connection(where, EventQueue())
    await connection.open()
    await connection.publish(TOPICS.advert("gw0"), advert, retain=True)
    assert await connection.drain(5)
    await connection.close()


def test_where_all_is_well_it_says_so_and_measures_a_round_trip(place: Place) -> None:
    async def main_() -> dict[str, Finding]:
        async with running_gateway(place):
            findings = await examine(place.broker.url, place.device)
            return {finding.check: finding for finding in findings}

    found = asyncio.run(asyncio.wait_for(main_(), 60))
    assert {finding.state for finding in found.values()} == {"ok"}, found
    assert list(found)[-4:] == ["gateway", "clock", "prekeys", "round trip"]
    assert "gw0 serves big" in found["gateway"].what
    assert "TLSv1.3" in found["tls"].what


def test_a_gateways_folder_is_looked_at_too(place: Place) -> None:
    found = look(place.broker.url, place.gateway)
    assert {finding.state for finding in found.values()} == {"ok"}, found
    assert "gateway gw0" in found["keys"].what


def test_keys_that_are_not_there(place: Place, tmp_path: Path) -> None:
    check_failed(look(place.broker.url, tmp_path / "none"), "keys", "cannot be read", "enroll")


def test_keys_that_others_can_read(place: Place) -> None:
    (place.device / "device.key").chmod(0o644)
    check_failed(look(place.broker.url, place.device), "keys", "chmod 600", "")


def test_a_certificate_of_another_key(place: Place) -> None:
    other = place.broker.device("c" * 32)
    assert other.key is not None
    (place.device / BROKER_KEY).write_bytes(other.key.read_bytes())
    check_failed(look(place.broker.url, place.device), "certificate", "whose key is", "enroll")


def test_a_certificate_without_its_key(place: Place) -> None:
    (place.device / BROKER_KEY).unlink()
    check_failed(look(place.broker.url, place.device), "certificate", "go together", "enroll")


def test_a_certificate_of_another_device(place: Place) -> None:
    install(place.broker.device("c" * 32), place.device)
    check_failed(
        look(place.broker.url, place.device), "certificate", "topics are", "came with these keys"
    )


def test_a_certificate_that_has_expired(place: Place) -> None:
    old = place.broker.device(place.handle, days=1, now_s=time.time() - 3 * 86400)
    install(old, place.device)
    check_failed(look(place.broker.url, place.device), "certificate", "expired", "set the clock")


def test_a_certificate_that_should_have_been_renewed_is_a_warning(place: Place) -> None:
    old = place.broker.device(place.handle, days=60, now_s=time.time() - 50 * 86400)
    install(old, place.device)
    found = look(place.broker.url, place.device)["certificate"]
    assert (found.state, "renewal is due" in found.what) == ("warning", True)


def test_no_certificate_at_all(place: Place) -> None:
    (place.device / BROKER_KEY).unlink()
    (place.device / BROKER_CERTIFICATE).unlink()
    found = look(place.broker.url, place.device)
    assert found["certificate"].state == "warning"
    check_failed(found, "broker", "certificate required", "tidegate enroll")


def test_a_name_that_nobody_knows(place: Place) -> None:
    found = look("mqtts://broker.invalid:8883", place.device)
    check_failed(found, "name", "broker.invalid", "--link")


def test_a_port_on_which_nobody_listens(place: Place) -> None:
    found = look(f"mqtts://localhost:{free_port()}", place.device)
    check_failed(found, "tcp", "connect", "start the broker")


def test_a_port_that_speaks_no_tls(place: Place) -> None:
    async def serve() -> dict[str, Finding]:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.write(b"SSH-2.0-something\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        findings = await examine(f"mqtts://127.0.0.1:{port}", place.device)
        server.close()
        return {finding.check: finding for finding in findings}

    check_failed(asyncio.run(serve()), "tls", "wrong version number", "may not speak TLS")


def test_a_broker_of_another_authority(place: Place, tmp_path: Path) -> None:
    other = SecureBroker(tmp_path / "other")
    (place.device / BROKER_CA).write_bytes(other.ca.certificate_pem)
    own = place.broker.device(place.handle)
    assert own.certificate is not None
    found = look(place.broker.url, place.device)
    # The folder's own certificate no longer fits its authority either, and that comes first.
    check_failed(found, "certificate", "not signed by", "enroll")


def test_a_broker_that_another_authority_signed(place: Place, tmp_path: Path) -> None:
    other = SecureBroker(tmp_path / "other")
    restart(place, replace_server=(other, ["localhost"], 365, None))
    check_failed(look(place.broker.url, place.device), "tls", "certificate refused", BROKER_CA)


def test_a_broker_that_goes_by_another_name(place: Place) -> None:
    restart(place, replace_server=(place.broker, ["another.example"], 365, None))
    check_failed(look(place.broker.url, place.device), "tls", "mismatch", "--host localhost")


def test_a_broker_whose_certificate_has_expired(place: Place) -> None:
    restart(place, replace_server=(place.broker, ["localhost"], 1, time.time() - 3 * 86400))
    check_failed(look(place.broker.url, place.device), "tls", "expired", "broker config")


def test_a_broker_whose_certificate_will_soon_expire_is_a_warning(place: Place) -> None:
    restart(place, replace_server=(place.broker, ["localhost"], 5, None))
    found = look(place.broker.url, place.device)["tls"]
    assert (found.state, "SIGHUP" in found.mend) == ("warning", True)


def restart(
    place: Place, *, replace_server: tuple[SecureBroker, list[str], int, float | None]
) -> None:
    """The broker, with another certificate of its own."""
    signer, names, days, now_s = replace_server
    place.broker.process.kill()
    place.broker.server = issue_server(signer.ca, names, days, now_s=now_s)
    place.broker.write()
    place.broker.process.start()


def test_a_broker_that_does_not_know_our_authority(place: Place, tmp_path: Path) -> None:
    other = SecureBroker(tmp_path / "other")
    (place.broker.folder / "ca.pem").write_bytes(other.ca.certificate_pem)
    place.broker.process.kill()
    place.broker.process.start()
    found = look(place.broker.url, place.device)
    check_failed(found, "broker", "unknown ca", "ca.pem")


def test_a_device_that_was_revoked(place: Place) -> None:
    place.broker.write(revoked=[(place.device / BROKER_CERTIFICATE).read_bytes()])
    place.broker.process.reload()
    time.sleep(0.3)
    found = look(place.broker.url, place.device)
    check_failed(found, "broker", "certificate revoked", "enroll it anew")


def test_rules_that_allow_too_much(place: Place) -> None:
    with (place.broker.folder / RULES).open("a") as rules:
        rules.write("pattern readwrite tidegate/#\n")
    place.broker.process.reload()
    time.sleep(0.3)
    found = look(place.broker.url, place.device)
    check_failed(found, "topics", "this client may read", "tidegate broker config")
    assert found["gateway"].state != "skipped", "one step does not need the other"


def test_rules_that_allow_too_little(place: Place) -> None:
    path = place.broker.folder / RULES
    lines = [line for line in path.read_text().splitlines() if "/q/%u" not in line]
    path.write_text("\n".join(lines) + "\n")
    place.broker.process.reload()
    time.sleep(0.3)
    found = look(place.broker.url, place.device)
    check_failed(found, "topics", "does not let us write", "tidegate broker config")


def test_no_gateway_anywhere(place: Place) -> None:
    found = look(place.broker.url, place.device)
    check_failed(found, "gateway", "none has announced itself", "tidegate cloud")


def test_a_gateway_of_another_fleet(place: Place, tmp_path: Path) -> None:
    pair(tmp_path / "other-device", tmp_path / "other-gateway")
    install(place.broker.gateway("gw0"), tmp_path / "other-gateway")
    asyncio.run(leave_advert(replace(place, gateway=tmp_path / "other-gateway")))
    found = look(place.broker.url, place.device)
    check_failed(found, "gateway", "pinned key", "another fleet")


def test_a_gateway_whose_key_is_revoked(place: Place) -> None:
    made = revoke_gateway(place.gateway / "fleet", "gw0")
    import_revocations(place.device, made.statement)
    asyncio.run(leave_advert(place))
    found = look(place.broker.url, place.device)
    check_failed(found, "gateway", "gw0 is on the fleet's list", "keys rotate gateway")
    (place.device / "gateways.revoked").write_bytes(b"damaged")
    check_failed(
        look(place.broker.url, place.device), "gateway", "gateways.revoked", "import-revoked"
    )


@pytest.mark.parametrize(
    ("off_s", "state", "said"),
    [
        (0.0, "ok", "agrees"),
        (-30.0, "ok", "agrees"),
        (60.0, "warning", "behind the gateway's signed time"),
        (3600.0, "failed", "behind the gateway's signed time"),
        (-300.0, "failed", "or this clock is ahead"),
    ],
)
def test_a_clock_that_is_off(place: Place, off_s: float, state: str, said: str) -> None:
    asyncio.run(leave_advert(place, off_s=off_s))
    found = look(place.broker.url, place.device)["clock"]
    assert (found.state, said in found.what) == (state, True), found
    assert ("timedatectl" in found.mend) == (state != "ok")


@pytest.mark.parametrize(
    ("age_h", "state", "said"),
    [(1, "ok", "1 h"), (30, "warning", "1 d 6 h"), (80, "failed", "none that is valid")],
)
def test_prekeys_that_are_old(place: Place, age_h: int, state: str, said: str) -> None:
    asyncio.run(leave_advert(place, prekey_age_s=age_h * 3600.0))
    found = look(place.broker.url, place.device)["prekeys"]
    assert (found.state, said in found.what) == (state, True), found
    assert ("prekeys.json" in found.mend) == (state != "ok")


def test_a_gateway_that_announced_itself_and_does_not_answer(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.cli.doctor_link_gateway._DEADLINE_S", 1.0)
    asyncio.run(leave_advert(place))
    found = look(place.broker.url, place.device)
    check_failed(found, "round trip", "deadline", "registry")


def test_keys_in_use_leave_the_round_trip_to_the_daemon(place: Place) -> None:
    async def main_() -> dict[str, Finding]:
        await leave_advert(place)
        daemon = DeviceLink(place.device, MemoryTransport(MemoryBroker()))
        try:
            findings = await examine(place.broker.url, place.device)
        finally:
            await daemon.close()
        return {finding.check: finding for finding in findings}

    found = asyncio.run(main_())["round trip"]
    assert (found.state, "/status" in found.what) == ("skipped", True)


def test_the_command_prints_findings_and_its_status_tells(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--link", place.broker.url, "--keys"]
    assert main(["doctor", "link", *where, str(place.gateway)]) == 0
    assert capsys.readouterr().out.endswith("tidegate doctor link: fine\n")
    assert main(["doctor", "link", *where, str(place.device), "--wait", "0.3"]) == 1
    said = capsys.readouterr().out
    assert "gateway      FAILED: none has announced itself within 0.3 s" in said
    assert "mend: start it (tidegate cloud" in said
    assert "clock        not looked at: gateway comes first" in said
    assert said.endswith("1 failed\n")
    assert main(["doctor", "link", *where, str(place.gateway), "--json"]) == 0
    assert {one["state"] for one in json.loads(capsys.readouterr().out)} == {"ok"}


def test_wrong_use_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "link"]) == 1
    assert "link = None" in capsys.readouterr().err
    assert main(["doctor", "link", "--link", "mqtts://broker.example"]) == 1
    assert "keys = None" in capsys.readouterr().err
