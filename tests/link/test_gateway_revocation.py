"""A gateway's stolen key: who says that it is believed no longer, and who learns it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st
from linklab import FAST
from linkpair import going

from tidegate.errors import IdentityError
from tidegate.link import gateway_revocation
from tidegate.link.counters import Tally
from tidegate.link.device import DeviceLink
from tidegate.link.effects import InboundRequest
from tidegate.link.fleet import add_device, add_gateway, create_fleet, revoke_gateway
from tidegate.link.fleet_rotation import rotate_gateway
from tidegate.link.gateway import Gateway
from tidegate.link.gateway_directory import GatewayDirectory
from tidegate.link.gateway_keys import GatewayKeys
from tidegate.link.gateway_revocation import (
    MOST_REVOKED,
    NONE_REVOKED,
    REVOKED_FILE,
    Revocations,
    RevokedGateways,
    import_revocations,
    open_revocations,
    seal_revocations,
)
from tidegate.link.identity import load_device, load_gateway, open_certificate, read_root
from tidegate.link.memory import MemoryBroker, MemoryTransport
from tidegate.link.prekeys import PrekeyStore
from tidegate.link.registry import DeviceRegistry
from tidegate.link.registry_exchange import export_devices, import_devices
from tidegate.link.timing import Timing
from tidegate.link.topics import Topics

ROOT = Ed25519PrivateKey.generate()
NOW_S = 1_800_000_000


def revoked(
    *gateways: str, before: Revocations = NONE_REVOKED, now_s: float = NOW_S
) -> Revocations:
    for gateway_id in gateways:
        before = seal_revocations(ROOT, "home", before, gateway_id, now_s=now_s)
    return before


def kept(path: Path | None) -> RevokedGateways:
    return RevokedGateways(ROOT.public_key(), "home", path)


def test_a_list_revokes_what_was_certified_by_then_and_nothing_later() -> None:
    made = revoked("gw0", "gw1")
    opened = open_revocations(ROOT.public_key(), "home", made.statement)
    assert opened == made
    assert opened.revokes("gw0", NOW_S)
    assert not opened.revokes("gw0", NOW_S + 1)
    assert not opened.revokes("gw2", 0)


def test_a_later_list_has_all_of_the_earlier_ones_and_a_greater_number() -> None:
    first = revoked("gw0")
    behind = revoked("gw1", before=first, now_s=NOW_S - 9000)
    assert behind.number > first.number, "whatever the clock says"
    again = revoked("gw0", before=behind, now_s=NOW_S - 9000)
    assert again.until_s == {"gw0": NOW_S, "gw1": NOW_S - 9000}, "no entry becomes less"


def test_a_list_is_bounded() -> None:
    full = replace(revoked("gw0"), until_s={f"g{n}": 1 for n in range(MOST_REVOKED)})
    with pytest.raises(IdentityError, match="256 gateways"):
        revoked("one-more", before=full)


@given(data=st.data())
def test_no_changed_byte_and_no_other_text_is_a_list(data: st.DataObject) -> None:
    whole = revoked("gw0").statement
    place = data.draw(st.integers(0, len(whole) - 1))
    broken = bytearray(whole)
    broken[place] ^= data.draw(st.integers(1, 255))
    for bad in (bytes(broken), whole[:place], data.draw(st.binary(max_size=100))):
        with pytest.raises(IdentityError):
            open_revocations(ROOT.public_key(), "home", bad)


def test_a_list_of_another_root_or_group_is_refused() -> None:
    made = revoked("gw0").statement
    with pytest.raises(IdentityError, match="pinned key"):
        open_revocations(Ed25519PrivateKey.generate().public_key(), "home", made)
    with pytest.raises(IdentityError, match="another group"):
        open_revocations(ROOT.public_key(), "office", made)


def test_what_was_taken_survives_a_restart_and_no_older_list_undoes_it(tmp_path: Path) -> None:
    old, new = revoked("gw1"), revoked("gw1", "gw0")
    path = tmp_path / REVOKED_FILE
    here = kept(path)
    assert here.take(new.statement)
    assert not here.take(new.statement)
    assert not here.take(old.statement)
    assert kept(path).current == new
    path.write_bytes(old.statement)
    here.refresh()
    assert here.current == new
    assert path.read_bytes() == new.statement, "put right"


def test_a_file_that_another_process_brings_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / REVOKED_FILE
    here = kept(path)
    path.write_bytes(revoked("gw0").statement)
    here.refresh()
    assert here.current.revokes("gw0", NOW_S)
    path.unlink()
    here.refresh()
    assert kept(path).current.revokes("gw0", NOW_S), "taking the file away undoes nothing"


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / REVOKED_FILE
    path.write_bytes(b"damaged")
    with pytest.raises(IdentityError, match=r"gateways\.revoked.*import-revoked"):
        kept(path)


def test_a_list_counts_even_where_the_disk_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / REVOKED_FILE
    here = kept(path)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(gateway_revocation, "write_atomic", full)
        assert here.take(revoked("gw0").statement)
    assert here.current.revokes("gw0", NOW_S)
    assert not path.exists()
    here.refresh()
    assert path.exists(), "written when there is room"


class Fleet:
    """Two gateways and a device; `gw0` is the one whose key is stolen."""

    def __init__(self, root: Path) -> None:
        self.root, self.fleet, self.device = root, root / "fleet", root / "device"
        self.gateways = {name: root / name for name in ("gw0", "gw1")}
        create_fleet(self.fleet)
        for name, folder in self.gateways.items():
            add_gateway(self.fleet, folder, name, enrols=False)
        add_device(self.fleet, self.device, list(self.gateways.values()))
        self.version = 0
        self.now_s = time.time()

    def revoke(self, name: str = "gw0") -> bytes:
        return revoke_gateway(self.fleet, name).statement

    def advert(self, name: str) -> bytes:
        """What this gateway says now."""
        folder = self.gateways[name]
        self.version += 1
        root = Ed25519PublicKey.from_public_bytes(read_root(folder))
        with closing(DeviceRegistry(folder / "devices.sqlite")) as registry:
            keys = GatewayKeys(
                identity=load_gateway(folder),
                prekeys=PrekeyStore(folder / "prekeys.json"),
                registry=registry,
                wall_s=lambda: self.now_s,
                revoked=RevokedGateways(root, "home", folder / REVOKED_FILE),
            )
            keys.rotate()
            return keys.advert(version=self.version, models=(), load=0.0, valid_s=60.0)

    def directory(self) -> GatewayDirectory:
        """The device's, as after a start."""
        identity = load_device(self.device)
        return GatewayDirectory(
            identity,
            timing=Timing(),
            rng=random.Random(1),
            wall_s=lambda: self.now_s,
            tally=Tally(),
            revoked=RevokedGateways(identity.root, identity.group, self.device / REVOKED_FILE),
        )

    def hear(self, directory: GatewayDirectory, *names: str) -> list[str]:
        """The gateways that are alive after these have spoken."""
        for name in names:
            directory.receive(0.0, Topics("home").advert(name), self.advert(name))
        return sorted(one.gateway_id for one in directory.alive(0.0))


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def test_an_honest_gateways_advert_tells_of_the_stolen_key_and_a_restart_forgets_nothing(
    fleet: Fleet,
) -> None:
    directory = fleet.directory()
    assert fleet.hear(directory, "gw0", "gw1") == ["gw0", "gw1"]
    import_revocations(fleet.gateways["gw1"], fleet.revoke())
    assert fleet.hear(directory, "gw0") == ["gw0", "gw1"], "nobody has told it yet"
    assert fleet.hear(directory, "gw1") == ["gw1"]
    assert fleet.hear(directory, "gw0") == ["gw1"]
    assert "gw0 is revoked" in directory.problem
    assert fleet.hear(fleet.directory(), "gw0") == [], "the first thing it hears after a start"


def test_the_gateway_goes_on_with_a_key_that_was_certified_later(fleet: Fleet) -> None:
    directory = fleet.directory()
    fleet.version = 1000
    fleet.hear(directory, "gw0")
    fleet.version = 0
    import_revocations(fleet.device, fleet.revoke())
    stolen = fleet.advert("gw0")
    rotate_gateway(fleet.fleet, fleet.gateways["gw0"])
    assert fleet.hear(directory, "gw0") == ["gw0"], "in the same second, with a lower version"
    fleet.revoke("gw1")
    directory.receive(0.0, Topics("home").advert("gw0"), stolen)
    assert "gw0 is revoked" in directory.problem


def test_a_key_that_was_certified_while_a_clock_was_ahead_is_revoked_all_the_same(
    tmp_path: Path,
) -> None:
    create_fleet(tmp_path / "fleet", now_s=NOW_S)
    add_gateway(tmp_path / "fleet", tmp_path / "gateway", "gw0", now_s=NOW_S + 7200)
    made = revoke_gateway(tmp_path / "fleet", "gw0", now_s=NOW_S)
    certificate = open_certificate(
        Ed25519PublicKey.from_public_bytes(read_root(tmp_path / "gateway")),
        (tmp_path / "gateway" / "gateway.cert").read_bytes(),
    )
    assert certificate.nbf_s == NOW_S + 7200
    assert made.revokes("gw0", certificate.nbf_s)
    assert not made.revokes("gw0", certificate.nbf_s + 1)


def test_an_older_list_in_an_advert_undoes_nothing(fleet: Fleet) -> None:
    directory = fleet.directory()
    import_revocations(fleet.gateways["gw0"], fleet.revoke("gw1"))
    import_revocations(fleet.device, fleet.revoke("gw0"))
    assert fleet.hear(directory, "gw0", "gw1") == []
    rotate_gateway(fleet.fleet, fleet.gateways["gw0"])
    assert fleet.hear(directory, "gw0", "gw1") == ["gw0"]


def test_a_list_from_a_file_reaches_a_running_device_and_once_only(fleet: Fleet) -> None:
    directory = fleet.directory()
    made = fleet.revoke()
    assert import_revocations(fleet.device, made) is not None
    assert import_revocations(fleet.device, made) is None
    assert fleet.hear(directory, "gw0") == []
    (fleet.device / REVOKED_FILE).write_bytes(b"damaged")
    assert import_revocations(fleet.device, made) is not None, "a damaged one gives way"
    with pytest.raises(IdentityError, match="pinned key"):
        import_revocations(fleet.device, revoked("gw0").statement)


def test_a_device_list_that_the_stolen_key_signed_is_refused(fleet: Fleet) -> None:
    thief = load_gateway(fleet.gateways["gw0"])
    with closing(DeviceRegistry(fleet.gateways["gw1"] / "devices.sqlite")) as registry:
        data = export_devices(thief, registry, now_s=fleet.now_s)
        made = revoke_gateway(fleet.fleet, "gw0")
        with pytest.raises(IdentityError, match="gw0 is revoked"):
            import_devices(
                data,
                root=read_root(fleet.gateways["gw1"]),
                group="home",
                registry=registry,
                now_s=fleet.now_s,
                revoked=made,
            )


def test_an_answer_under_way_from_the_stolen_key_is_believed_no_further(fleet: Fleet) -> None:
    spoke = asyncio.Event()
    answer = [b"%d" % number for number in range(8)]

    async def thief(request: InboundRequest) -> AsyncIterator[bytes]:
        for part in answer[:3]:
            yield part
        await spoke.wait()
        yield b"a lie"

    async def honest(request: InboundRequest) -> AsyncIterator[bytes]:
        for part in answer:
            yield part

    async def main() -> None:
        broker = MemoryBroker()
        async with asyncio.timeout(30), AsyncExitStack() as stack:

            async def start(name: str, handler: object) -> None:
                transport = MemoryTransport(broker)
                folder = fleet.gateways[name]
                gateway = Gateway(folder, transport, handler, timing=FAST)  # type: ignore[arg-type]
                stack.push_async_callback(gateway.close)
                await stack.enter_async_context(going(gateway.run()))

            await start("gw0", thief)
            link = DeviceLink(fleet.device, MemoryTransport(broker), timing=FAST)
            stack.push_async_callback(link.close)
            await stack.enter_async_context(going(link.run()))
            while not await link.gateways():
                await asyncio.sleep(0.01)
            got: list[bytes] = []
            async for part in link.request(b"", deadline_s=20.0):
                got.append(part)
                if len(got) == 3:
                    import_revocations(fleet.gateways["gw1"], fleet.revoke())
                    await start("gw1", honest)
                    while [one.gateway_id for one in await link.gateways()] != ["gw1"]:
                        await asyncio.sleep(0.01)
                    spoke.set()
            assert got == answer

    asyncio.run(main())
