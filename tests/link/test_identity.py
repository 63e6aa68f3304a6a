"""Keys, files, fleets and the registry."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tidegate.errors import ConfigError, IdentityError
from tidegate.link.envelope import DeviceId
from tidegate.link.fleet import add_device, add_gateway, create_fleet, pair
from tidegate.link.identity import (
    load_device,
    load_gateway,
    open_certificate,
)
from tidegate.link.keyfiles import load_or_make_key, read_key, read_secret, write_atomic
from tidegate.link.registry import DeviceRecord, DeviceRegistry
from tidegate.link.statements import sign, verify


def test_a_secret_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.key"
    write_atomic(path, b"k" * 32)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert read_key(path) == b"k" * 32


def test_writing_again_replaces_the_file_and_leaves_no_scraps(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert read_secret(path) == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.key"
    write_atomic(path, b"k" * 32)
    path.chmod(mode)
    with pytest.raises(IdentityError, match="chmod 600"):
        read_key(path)


def test_a_key_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.key", b"short")
    with pytest.raises(IdentityError, match="5 bytes"):
        read_key(tmp_path / "a.key")


def test_a_missing_or_huge_key_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"a\.key"):
        read_key(tmp_path / "a.key")
    write_atomic(tmp_path / "b.key", bytes(70_000))
    with pytest.raises(IdentityError, match="larger than"):
        read_secret(tmp_path / "b.key")


def test_a_local_key_is_made_once(tmp_path: Path) -> None:
    key = load_or_make_key(tmp_path / "local.key")
    assert load_or_make_key(tmp_path / "local.key") == key
    assert len(key) == 32


def test_a_pair_is_a_fleet_of_two_and_making_it_twice_changes_nothing(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")
    device = load_device(tmp_path / "device")
    pair(tmp_path / "device", tmp_path / "gateway")
    again = load_device(tmp_path / "device")
    gateway = load_gateway(tmp_path / "gateway")
    assert (device.device_id, device.handle) == (again.device_id, again.handle)
    assert (device.group, gateway.gateway_id) == ("home", "gw0")
    certificate = open_certificate(device.root, gateway.certificate)
    assert certificate.gateway_id == "gw0"
    assert certificate.key == gateway.key.public_key()


def test_every_file_of_a_fleet_is_private(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 8
    assert [path for path in files if path.stat().st_mode & 0o077] == []


def test_the_handle_says_nothing_about_the_device(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")
    device = load_device(tmp_path / "device")
    assert len(device.handle) == 32
    assert device.handle != device.device_id.hex()


def test_one_device_can_be_known_to_several_gateways(tmp_path: Path) -> None:
    create_fleet(tmp_path / "fleet", group="lab")
    gateways = [tmp_path / name for name in ("a", "b")]
    for path in gateways:
        add_gateway(tmp_path / "fleet", path, path.name)
    device = add_device(tmp_path / "fleet", tmp_path / "device", gateways)
    for path in gateways:
        registry = DeviceRegistry(path / "devices.sqlite")
        record = registry.find(device.device_id)
        registry.close()
        assert record is not None
        assert (record.handle, record.revoked) == (device.handle, False)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")
    fleet = tmp_path / "gateway" / "fleet"
    with pytest.raises(IdentityError, match="already has a fleet root"):
        create_fleet(fleet)
    with pytest.raises(IdentityError, match="already has a gateway"):
        add_gateway(fleet, tmp_path / "gateway", "gw1")
    with pytest.raises(IdentityError, match="already has a device"):
        add_device(fleet, tmp_path / "device", [])


@pytest.mark.parametrize("name", ["", "a/b", "a+", "#", "a" * 65, "ü"])
def test_a_name_that_cannot_be_a_topic_level_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        create_fleet(tmp_path, group=name)


def test_a_damaged_identity_file_is_refused_by_name(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")
    (tmp_path / "device" / "device.json").write_text("[]")
    with pytest.raises(IdentityError, match=r"device\.json"):
        load_device(tmp_path / "device")
    (tmp_path / "gateway" / "gateway.json").write_text("{")
    with pytest.raises(IdentityError, match=r"gateway\.json"):
        load_gateway(tmp_path / "gateway")
    (tmp_path / "gateway" / "gateway.json").write_text('{"group": "home", "gateway": 3}')
    with pytest.raises(IdentityError, match="gateway: must be a string"):
        load_gateway(tmp_path / "gateway")


def test_a_revocation_by_another_process_is_seen_at_once(tmp_path: Path) -> None:
    name = DeviceId(os.urandom(16))
    here = DeviceRegistry(tmp_path / "devices.sqlite")
    there = DeviceRegistry(tmp_path / "devices.sqlite")
    here.add(DeviceRecord(device_id=name, handle="h", public_key=bytes(32), revoked=False))
    there.revoke(name)
    record = here.find(name)
    assert record is not None
    assert record.revoked
    with pytest.raises(IdentityError, match="not registered"):
        here.revoke(DeviceId(bytes(16)))
    here.close()
    there.close()


def test_a_statement_counts_only_for_its_purpose_and_its_signer() -> None:
    key = Ed25519PrivateKey.generate()
    statement = sign(key, "advert", {"b": 1, "a": "x"})
    assert verify(key.public_key(), "advert", statement) == {"a": "x", "b": 1}
    assert statement[64:] == b'{"a":"x","b":1}'
    other = Ed25519PrivateKey.generate().public_key()
    for public, label in ((key.public_key(), "certificate"), (other, "advert")):
        with pytest.raises(IdentityError, match="pinned key"):
            verify(public, label, statement)


def test_no_repr_of_an_identity_shows_a_key(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")
    shown = repr(load_device(tmp_path / "device")) + repr(load_gateway(tmp_path / "gateway"))
    assert "Key" not in shown
    assert "certificate" not in shown
