"""Device lists between gateways: what they add, and that nothing ever comes back."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tidegate.errors import IdentityError
from tidegate.link.envelope import DeviceId
from tidegate.link.fleet import add_gateway, create_fleet
from tidegate.link.identity import GatewayIdentity, read_root
from tidegate.link.registry import DeviceRecord, DeviceRegistry
from tidegate.link.registry_exchange import Imported, export_devices, import_devices

NOW_S = 1_800_000_000


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> tuple[GatewayIdentity, bytes]:
    """The gateway that signs, and the fleet's root."""
    root = tmp_path_factory.mktemp("fleet")
    create_fleet(root / "fleet", now_s=NOW_S)
    identity = add_gateway(root / "fleet", root / "gateway", "gw0", now_s=NOW_S)
    return identity, read_root(root / "gateway")


@pytest.fixture
def here(tmp_path: Path) -> Iterator[DeviceRegistry]:
    registry = DeviceRegistry(tmp_path / "here.sqlite")
    yield registry
    registry.close()


@pytest.fixture
def there(tmp_path: Path) -> Iterator[DeviceRegistry]:
    registry = DeviceRegistry(tmp_path / "there.sqlite")
    yield registry
    registry.close()


def record(number: int, *, revoked: bool = False, expires_s: int | None = NOW_S) -> DeviceRecord:
    return DeviceRecord(
        device_id=DeviceId(bytes([number]) * 16),
        handle=f"{number:032x}",
        public_key=bytes([number]) * 32,
        revoked=revoked,
        enrolled_s=NOW_S,
        expires_s=expires_s,
    )


def take(data: bytes, root: bytes, registry: DeviceRegistry, *, group: str = "home") -> Imported:
    return import_devices(data, root=root, group=group, registry=registry, now_s=NOW_S)


def test_a_list_brings_devices_and_revocations_and_takes_nothing_away(
    fleet: tuple[GatewayIdentity, bytes], here: DeviceRegistry, there: DeviceRegistry
) -> None:
    identity, root = fleet
    for one in (record(1, revoked=True), record(2, expires_s=NOW_S + 9), record(3, expires_s=None)):
        there.add(one)
    for one in (record(1), record(2, revoked=True), record(4)):
        here.add(one)
    data = export_devices(identity, there, now_s=NOW_S)
    assert take(data, root, here) == Imported(added=1, revoked=1)
    assert here.devices() == [
        record(1, revoked=True),
        record(2, revoked=True, expires_s=NOW_S + 9),
        record(3, expires_s=None),
        record(4),
    ]
    assert take(data, root, here) == Imported(added=0, revoked=0)


def test_an_old_list_brings_no_revoked_device_back(
    fleet: tuple[GatewayIdentity, bytes], here: DeviceRegistry, there: DeviceRegistry
) -> None:
    identity, root = fleet
    there.add(record(1))
    old = export_devices(identity, there, now_s=NOW_S)
    take(old, root, here)
    here.revoke(record(1).device_id)
    take(old, root, here)
    assert here.devices() == [record(1, revoked=True)]


def test_a_list_that_contradicts_what_is_known_changes_nothing(
    fleet: tuple[GatewayIdentity, bytes], here: DeviceRegistry, there: DeviceRegistry
) -> None:
    identity, root = fleet
    there.add(record(1))
    there.add(record(2))
    other = record(9)
    here.add(DeviceRecord(**{**_fields(other), "device_id": record(2).device_id}))  # type: ignore[arg-type]
    with pytest.raises(IdentityError, match="known here with another key"):
        take(export_devices(identity, there, now_s=NOW_S), root, here)
    assert len(here.devices()) == 1


def test_nobody_changes_a_device_between_the_look_at_it_and_the_list(
    fleet: tuple[GatewayIdentity, bytes], there: DeviceRegistry, tmp_path: Path
) -> None:
    class Watched(DeviceRegistry):
        """Somebody else tries to write whenever it is read."""

        refused = 0

        def devices(self) -> list[DeviceRecord]:
            found = super().devices()
            with closing(sqlite3.connect(tmp_path / "here.sqlite", timeout=0)) as other:
                try:
                    other.execute("UPDATE devices SET public_key = x'00'")
                except sqlite3.OperationalError:
                    self.refused += 1
            return found

    identity, root = fleet
    there.add(record(1))
    with closing(Watched(tmp_path / "here.sqlite")) as here:
        here.add(record(1))
        take(export_devices(identity, there, now_s=NOW_S), root, here)
        assert here.refused == 1


def _fields(one: DeviceRecord) -> dict[str, object]:
    return {name: getattr(one, name) for name in one.__slots__}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_no_changed_byte_and_no_other_text_is_a_list(
    fleet: tuple[GatewayIdentity, bytes],
    here: DeviceRegistry,
    there: DeviceRegistry,
    data: st.DataObject,
) -> None:
    identity, root = fleet
    there.add(record(1))
    whole = export_devices(identity, there, now_s=NOW_S)
    place = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(1, 255))
    broken = whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :]
    for bad in (broken, whole[:place], data.draw(st.binary(max_size=100))):
        with pytest.raises(IdentityError):
            take(bad, root, here)
    assert here.devices() == []


def test_a_list_of_another_fleet_or_group_or_time_is_refused(
    fleet: tuple[GatewayIdentity, bytes], here: DeviceRegistry, tmp_path: Path
) -> None:
    identity, root = fleet
    create_fleet(tmp_path / "fleet")
    stranger = add_gateway(tmp_path / "fleet", tmp_path / "gateway", "gw0", now_s=NOW_S)
    with pytest.raises(IdentityError, match="pinned key"):
        take(export_devices(stranger, here, now_s=NOW_S), root, here)
    data = export_devices(identity, here, now_s=NOW_S)
    with pytest.raises(IdentityError, match="another group"):
        take(data, root, here, group="lab")
    with pytest.raises(IdentityError, match="not valid any more"):
        import_devices(data, root=root, group="home", registry=here, now_s=NOW_S + 366 * 86400)
