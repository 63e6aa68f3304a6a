"""Renewal over the link: when it is due, what it changes, and who is refused."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from linklab import FAST

from tidegate.errors import IdentityError
from tidegate.link import enrolment_renewal
from tidegate.link.certificate_facts import check_issued, common_name, read_facts
from tidegate.link.device import DeviceLink
from tidegate.link.effects import InboundRequest
from tidegate.link.enrolment_device import enrol
from tidegate.link.enrolment_gateway import Enrolment
from tidegate.link.enrolment_renewal import PREFIX, CertificateRenewal, RenewingHandler, install
from tidegate.link.envelope import RequestId
from tidegate.link.fleet import add_gateway, certify_for_broker, create_fleet, pair
from tidegate.link.gateway import Gateway
from tidegate.link.identity import load_device
from tidegate.link.keyfiles import passphrase_from_environment, write_atomic
from tidegate.link.memory import MemoryBroker, MemoryTransport

DAY_S = 86400


@dataclass
class World:
    """A gateway, a device that enrolled at it, and the clock of both."""

    root: Path
    now_s: float
    enrolment: Enrolment = field(init=False)

    def __post_init__(self) -> None:
        create_fleet(self.root / "fleet", now_s=self.now_s)
        add_gateway(self.root / "fleet", self.root / "gateway", "gw0", now_s=self.now_s)
        self.enrolment = Enrolment(self.root / "gateway", wall_s=self.clock)
        token = self.enrolment.make_token()
        enrol(self.root / "device", token, self.enrolment.enrol, now_s=self.clock)

    def clock(self) -> float:
        return self.now_s

    def certificate(self) -> bytes:
        return (self.root / "device" / "broker-cert.pem").read_bytes()

    def check_files(self) -> None:
        """Certificate, key and authorities in the device's folder belong together."""
        folder = self.root / "device"
        authorities = (folder / "broker-ca.pem").read_bytes()
        check_issued(self.certificate(), authorities, (folder / "broker-key.pem").read_bytes())


@dataclass
class DirectLink:
    """What renewal needs of a link, with the gateway's handler at its other end."""

    world: World
    handler: RenewingHandler
    bodies: list[bytes] = field(default_factory=list)
    loses_answers: bool = False

    async def request(self, body: bytes, *, deadline_s: float) -> AsyncGenerator[bytes, None]:
        assert deadline_s > 0
        self.bodies.append(body)
        device_id = load_device(self.world.root / "device").device_id
        request = InboundRequest(
            device_id=device_id, handle="it", request_id=RequestId(bytes(16)), body=body, attempt=0
        )
        async for payload in self.handler(request):
            if self.loses_answers:
                raise IdentityError("the answer was lost")
            yield payload


async def echo(request: InboundRequest) -> AsyncIterator[bytes]:
    yield request.body


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, 1_800_000_000.0)


def _link(world: World) -> DirectLink:
    return DirectLink(world, RenewingHandler(echo, world.enrolment))


def _renewal(world: World, link: DirectLink) -> CertificateRenewal:
    return CertificateRenewal(world.root / "device", link, wall_s=world.clock)


def test_renewal_is_due_at_two_thirds_of_a_certificates_life(world: World) -> None:
    renewal = _renewal(world, _link(world))
    assert 39.9 * DAY_S < renewal.due_in_s() < 40 * DAY_S
    world.now_s += 40 * DAY_S
    assert renewal.due_in_s() <= 0


def test_a_renewal_changes_key_and_certificate_and_nothing_else(world: World) -> None:
    before, handle = world.certificate(), load_device(world.root / "device").handle
    device_key = (world.root / "device" / "device.key").read_bytes()
    world.now_s += 40 * DAY_S
    link = _link(world)
    asyncio.run(_renewal(world, link).renew())
    assert common_name(world.certificate()) == handle
    assert read_facts(world.certificate()).naf_s == world.now_s + 60 * DAY_S
    assert world.certificate() != before
    world.check_files()
    assert (world.root / "device" / "device.key").read_bytes() == device_key
    assert [one.name for one in (world.root / "device").glob("renewing*")] == []
    assert b"PRIVATE" not in link.bodies[0]


def test_a_lost_answer_is_asked_for_again_with_the_same_key(world: World) -> None:
    world.now_s += 40 * DAY_S
    link = _link(world)
    link.loses_answers = True
    renewal = _renewal(world, link)
    with pytest.raises(IdentityError, match="lost"):
        asyncio.run(renewal.renew())
    link.loses_answers = False
    asyncio.run(renewal.renew())
    assert link.bodies[0] == link.bodies[1]
    assert world.enrolment.registry.read("SELECT count(*) FROM certificates") == [(2,)]
    world.check_files()


@pytest.mark.parametrize("step", range(1, 8))
def test_a_device_that_dies_in_the_middle_goes_on_at_its_next_start(
    world: World, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    world.now_s += 40 * DAY_S
    before = world.certificate()
    writes = [0]

    def dying(path: Path, data: bytes) -> None:
        writes[0] += 1
        if writes[0] == step:
            raise KeyboardInterrupt
        write_atomic(path, data)

    monkeypatch.setattr(enrolment_renewal, "write_atomic", dying)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(_renewal(world, _link(world)).renew())
    monkeypatch.setattr(enrolment_renewal, "write_atomic", write_atomic)
    install(world.root / "device")
    world.check_files()
    if step <= 3:
        assert world.certificate() == before
        asyncio.run(_renewal(world, _link(world)).renew())
    assert world.certificate() != before
    world.check_files()


def test_a_refusal_is_said_and_leaves_the_files_alone(world: World) -> None:
    before = world.certificate()
    world.enrolment.revoke(load_device(world.root / "device").handle)
    with pytest.raises(IdentityError, match="device_revoked"):
        asyncio.run(_renewal(world, _link(world)).renew())
    assert world.certificate() == before


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"event":"failed"}', b"\xff"])
def test_an_answer_that_is_none_is_refused(world: World, answer: bytes) -> None:
    async def other(request: InboundRequest) -> AsyncIterator[bytes]:
        yield answer

    link = _link(world)
    link.handler = other  # type: ignore[assignment]
    with pytest.raises(IdentityError):
        asyncio.run(_renewal(world, link).renew())
    world.check_files()


def test_a_certificate_from_a_stranger_is_not_installed(world: World, tmp_path: Path) -> None:
    stranger = World(tmp_path / "stranger", world.now_s)
    before = world.certificate()
    fields = {
        "certificate": stranger.certificate().decode(),
        "authorities": (stranger.root / "device" / "broker-ca.pem").read_text(),
        "facts": (stranger.root / "device" / "fleet.facts").read_bytes().hex(),
    }

    async def other(request: InboundRequest) -> AsyncIterator[bytes]:
        yield json.dumps(fields).encode()

    link = _link(world)
    link.handler = other  # type: ignore[assignment]
    with pytest.raises(IdentityError, match="pinned key"):
        asyncio.run(_renewal(world, link).renew())
    assert world.certificate() == before


def test_other_requests_reach_the_handler_untouched(world: World) -> None:
    link = _link(world)

    async def main() -> list[bytes]:
        return [one async for one in link.request(b'{"messages":[]}', deadline_s=1)]

    assert asyncio.run(main()) == [b'{"messages":[]}']


def test_a_device_without_a_certificate_has_nothing_to_renew(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")

    class NoLink:
        async def request(self, body: bytes, *, deadline_s: float) -> AsyncGenerator[bytes, None]:
            raise AssertionError("nobody is asked")
            yield b""

    asyncio.run(asyncio.wait_for(CertificateRenewal(tmp_path / "device", NoLink()).run(), 1))


def test_a_gateway_renews_its_own_certificate_and_keeps_its_key(world: World) -> None:
    gateway = world.root / "gateway"
    assert not world.enrolment.renew_own()
    certify_for_broker(world.root / "fleet", gateway, passphrase=passphrase_from_environment)
    key = (gateway / "broker-key.pem").read_bytes()
    world.now_s = read_facts((gateway / "broker-cert.pem").read_bytes()).naf_s - 1
    assert world.enrolment.renew_own()
    assert not world.enrolment.renew_own()
    pem = (gateway / "broker-cert.pem").read_bytes()
    check_issued(pem, (gateway / "broker-ca.pem").read_bytes(), key)
    assert common_name(pem) == "gw-gw0"


def test_a_certificate_is_renewed_over_a_real_link_when_its_time_has_come(tmp_path: Path) -> None:
    world = World(tmp_path, time.time() - 50 * DAY_S)
    before = world.certificate()
    world.now_s = time.time()

    async def main() -> None:
        broker = MemoryBroker()
        handler = RenewingHandler(echo, world.enrolment)
        gateway = Gateway(tmp_path / "gateway", MemoryTransport(broker), handler, timing=FAST)
        device = DeviceLink(tmp_path / "device", MemoryTransport(broker), timing=FAST)
        renewal = CertificateRenewal(tmp_path / "device", device)
        parts = [asyncio.create_task(one.run()) for one in (gateway, device, renewal)]
        try:
            async with asyncio.timeout(20):
                while world.certificate() == before:
                    await asyncio.sleep(0.01)
        finally:
            for part in parts:
                part.cancel()
                with suppress(asyncio.CancelledError):
                    await part
            await gateway.close()
            await device.close()
        assert not any(PREFIX in message.payload for message in broker.seen)

    asyncio.run(main())
    world.check_files()
    assert read_facts(world.certificate()).naf_s > time.time() + 59 * DAY_S
