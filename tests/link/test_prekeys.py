"""Prekeys and adverts: their lives, and who may speak."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tidegate.errors import CapacityError, ConfigError, IdentityError
from tidegate.link import statements
from tidegate.link.fleet import add_device, add_gateway, create_fleet
from tidegate.link.identity import DeviceIdentity, GatewayIdentity
from tidegate.link.prekeys import (
    ROTATE_AFTER_S,
    VALID_FOR_S,
    Advert,
    ModelOffer,
    PrekeyStore,
    open_advert,
    seal_advert,
)
from tidegate.link.suites import HYBRID, X25519

NOW_S = 1_800_000_000


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> tuple[DeviceIdentity, GatewayIdentity]:
    root = tmp_path_factory.mktemp("fleet")
    create_fleet(root / "fleet")
    gateway = add_gateway(root / "fleet", root / "gw", "gw0", now_s=NOW_S)
    return add_device(root / "fleet", root / "device", [root / "gw"]), gateway


def advert_of(gateway: GatewayIdentity, store: PrekeyStore) -> Advert:
    return Advert(
        group=gateway.group,
        gateway_id=gateway.gateway_id,
        gateway_key=gateway.key.public_key(),
        version=7,
        issued_s=NOW_S,
        expires_s=NOW_S + 60,
        suites=store.suites,
        models=(ModelOffer(id="qwen3-8b", context_tokens=8192),),
        load=0.25,
        prekeys=tuple(store.public(NOW_S)),
    )


@pytest.fixture
def store(tmp_path: Path) -> PrekeyStore:
    store = PrekeyStore(tmp_path / "prekeys.json")
    store.rotate(NOW_S)
    return store


def test_an_advert_survives_the_trip(
    fleet: tuple[DeviceIdentity, GatewayIdentity], store: PrekeyStore
) -> None:
    device, gateway = fleet
    advert = advert_of(gateway, store)
    opened = open_advert(
        seal_advert(gateway, advert), root=device.root, group="home", now_s=NOW_S + 1
    )
    assert dataclasses.replace(opened, prekeys=()) == dataclasses.replace(advert, prekeys=())
    prekey = opened.prekey(NOW_S)
    assert prekey is not None
    assert prekey.prekey_id == store.public(NOW_S)[0].prekey_id
    private = store.find(prekey.suite, prekey.prekey_id, NOW_S)
    assert private is not None
    assert private.public == prekey.public


def test_the_first_of_a_devices_suites_that_is_advertised_is_chosen(
    fleet: tuple[DeviceIdentity, GatewayIdentity], store: PrekeyStore
) -> None:
    advert = advert_of(fleet[1], store)
    chosen = {
        suites: None if (prekey := advert.prekey(NOW_S, suites)) is None else prekey.suite
        for suites in ((HYBRID, X25519), (X25519, HYBRID), (HYBRID,), (X25519,))
    }
    assert list(chosen.values()) == [HYBRID, X25519, HYBRID, X25519]
    only_old = dataclasses.replace(advert, suites=(X25519,))
    default, pinned = only_old.prekey(NOW_S), only_old.prekey(NOW_S, (HYBRID,))
    assert default is not None
    assert (default.suite, pinned) == (X25519, None)


def test_an_advert_from_before_the_second_suite_still_opens(
    fleet: tuple[DeviceIdentity, GatewayIdentity], tmp_path: Path
) -> None:
    device, gateway = fleet
    store = PrekeyStore(tmp_path / "prekeys.json", suites=(X25519,))
    store.rotate(NOW_S)
    payload = seal_advert(gateway, advert_of(gateway, store))
    opened = open_advert(payload, root=device.root, group="home", now_s=NOW_S)
    assert opened.suites == (X25519,)
    prekey = opened.prekey(NOW_S)
    assert prekey is not None
    assert (prekey.suite, opened.gateway_key) == (X25519, gateway.key.public_key())


def test_a_prekey_of_a_suite_that_is_newer_than_this_program_is_skipped(
    fleet: tuple[DeviceIdentity, GatewayIdentity], store: PrekeyStore
) -> None:
    device, gateway = fleet
    payload = seal_advert(gateway, advert_of(gateway, store))
    split = 2 + int.from_bytes(payload[:2], "big")
    fields = json.loads(payload[split + 64 :])
    fields["suites"].append(9)
    fields["prekeys"].append({"suite": 9, "new": "form"})
    signed = statements.sign(gateway.key, "advert", fields)
    opened = open_advert(payload[:split] + signed, root=device.root, group="home", now_s=NOW_S)
    assert [prekey.suite for prekey in opened.prekeys] == [HYBRID, X25519]
    assert opened.suites == (HYBRID, X25519, 9)


@pytest.mark.parametrize("public", ["00" * 32, "ff" * 1216, "zz", 7])
def test_a_signed_advert_with_a_prekey_that_is_no_key_is_refused(
    fleet: tuple[DeviceIdentity, GatewayIdentity], store: PrekeyStore, public: object
) -> None:
    device, gateway = fleet
    payload = seal_advert(gateway, advert_of(gateway, store))
    split = 2 + int.from_bytes(payload[:2], "big")
    fields = json.loads(payload[split + 64 :])
    fields["prekeys"][0]["public"] = public
    signed = statements.sign(gateway.key, "advert", fields)
    with pytest.raises(IdentityError, match="public"):
        open_advert(payload[:split] + signed, root=device.root, group="home", now_s=NOW_S)


def test_an_advert_with_both_suites_is_small(
    fleet: tuple[DeviceIdentity, GatewayIdentity], store: PrekeyStore
) -> None:
    for day in range(3):
        store.rotate(NOW_S + day * ROTATE_AFTER_S)
    assert len(seal_advert(fleet[1], advert_of(fleet[1], store))) < 4096


def test_an_advert_with_any_byte_flipped_is_refused(
    fleet: tuple[DeviceIdentity, GatewayIdentity], store: PrekeyStore
) -> None:
    device, gateway = fleet
    payload = seal_advert(gateway, advert_of(gateway, store))
    for i in range(len(payload)):
        damaged = payload[:i] + bytes((payload[i] ^ 1,)) + payload[i + 1 :]
        with pytest.raises(IdentityError):
            open_advert(damaged, root=device.root, group="home", now_s=NOW_S)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_any_bytes_are_no_advert(
    fleet: tuple[DeviceIdentity, GatewayIdentity], data: bytes
) -> None:
    with pytest.raises(IdentityError):
        open_advert(data, root=fleet[0].root, group="home", now_s=NOW_S)


@pytest.mark.parametrize(
    ("change", "now_s", "problem"),
    [
        ({}, NOW_S + 60 + 600, "ended 10 min ago"),
        ({}, NOW_S - 601, "clock .* is 10 min 1 s behind"),
        ({"expires_s": NOW_S + 400 * 86400}, NOW_S + 366 * 86400, "certificate"),
        ({"group": "other"}, NOW_S, "another gateway"),
        ({"gateway_id": "gw1"}, NOW_S, "another gateway"),
    ],
)
def test_an_advert_is_refused_out_of_its_time_and_place(
    fleet: tuple[DeviceIdentity, GatewayIdentity],
    store: PrekeyStore,
    change: dict[str, object],
    now_s: int,
    problem: str,
) -> None:
    device, gateway = fleet
    advert = dataclasses.replace(advert_of(gateway, store), **change)  # type: ignore[arg-type]
    payload = seal_advert(gateway, advert)
    with pytest.raises(IdentityError, match=problem):
        open_advert(payload, root=device.root, group="home", now_s=now_s)


@pytest.mark.parametrize("off_s", [-600, 0, 600])
def test_a_clock_that_is_ten_minutes_off_takes_a_fresh_advert(
    fleet: tuple[DeviceIdentity, GatewayIdentity], store: PrekeyStore, off_s: int
) -> None:
    device, gateway = fleet
    payload = seal_advert(gateway, advert_of(gateway, store))
    assert open_advert(payload, root=device.root, group="home", now_s=NOW_S + off_s)


def test_an_advert_for_another_group_is_refused(
    fleet: tuple[DeviceIdentity, GatewayIdentity], store: PrekeyStore
) -> None:
    device, gateway = fleet
    payload = seal_advert(gateway, advert_of(gateway, store))
    with pytest.raises(IdentityError, match="group 'home'"):
        open_advert(payload, root=device.root, group="office", now_s=NOW_S)


def test_an_advert_of_another_fleet_is_refused(
    fleet: tuple[DeviceIdentity, GatewayIdentity], store: PrekeyStore, tmp_path: Path
) -> None:
    create_fleet(tmp_path / "fleet")
    stranger = add_gateway(tmp_path / "fleet", tmp_path / "gw", "gw0", now_s=NOW_S)
    payload = seal_advert(stranger, advert_of(stranger, store))
    with pytest.raises(IdentityError, match="pinned key"):
        open_advert(payload, root=fleet[0].root, group="home", now_s=NOW_S)


def test_a_suite_we_do_not_speak_is_never_chosen(
    fleet: tuple[DeviceIdentity, GatewayIdentity], store: PrekeyStore
) -> None:
    advert = dataclasses.replace(advert_of(fleet[1], store), suites=(9,))
    assert advert.prekey(NOW_S) is None


def test_prekeys_are_made_daily_live_three_days_and_are_erased(tmp_path: Path) -> None:
    path = tmp_path / "prekeys.json"
    store = PrekeyStore(path)
    assert store.rotate(NOW_S)
    assert not store.rotate(NOW_S + ROTATE_AFTER_S - 1)
    first = {prekey.suite: prekey.prekey_id for prekey in store.public(NOW_S)}
    assert set(first) == {HYBRID, X25519}
    assert store.rotate(NOW_S + ROTATE_AFTER_S)
    second = {prekey.suite: prekey.prekey_id for prekey in store.public(NOW_S + ROTATE_AFTER_S)}
    assert set(second) == set(first)
    assert not set(second.values()) & set(first.values())
    privates = [store.find(suite, first[suite], NOW_S + VALID_FOR_S - 1) for suite in first]
    assert all(private is not None for private in privates)
    assert all(store.find(suite, first[suite], NOW_S + VALID_FOR_S) is None for suite in first)
    written = [private.raw.hex() for private in privates if private is not None]
    assert all(raw in path.read_text() for raw in written)
    assert store.rotate(NOW_S + VALID_FOR_S)
    assert not any(raw in path.read_text() for raw in written)


def test_a_prekey_is_found_under_its_own_suite_only(store: PrekeyStore) -> None:
    hybrid, curve = store.public(NOW_S)
    assert store.find(HYBRID, hybrid.prekey_id, NOW_S) is not None
    assert store.find(X25519, hybrid.prekey_id, NOW_S) is None
    assert store.find(HYBRID, curve.prekey_id, NOW_S) is None


def test_prekeys_of_a_suite_that_is_given_up_are_erased(tmp_path: Path) -> None:
    path = tmp_path / "prekeys.json"
    PrekeyStore(path).rotate(NOW_S)
    store = PrekeyStore(path, suites=(HYBRID,))
    assert store.rotate(NOW_S)
    assert [prekey.suite for prekey in store.public(NOW_S)] == [HYBRID]
    assert '"suite": 1' not in path.read_text()


@pytest.mark.parametrize("suites", [(), (1, 1), (3,), (2, 0)])
def test_suites_that_cannot_be_used_are_refused_with_those_that_can(
    tmp_path: Path, suites: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match=r"link\.suites.*2 \(MLKEM768-X25519\)"):
        PrekeyStore(tmp_path / "prekeys.json", suites=suites)


def test_a_prekey_from_a_clock_that_was_wrong_is_replaced(tmp_path: Path) -> None:
    store = PrekeyStore(tmp_path / "prekeys.json")
    store.rotate(NOW_S + 365 * 86400)
    assert store.rotate(NOW_S)
    assert [prekey.nbf_s for prekey in store.public(NOW_S)] == [NOW_S, NOW_S]


def test_a_set_of_prekeys_that_was_not_written_is_not_used(tmp_path: Path) -> None:
    store = PrekeyStore(tmp_path / "prekeys.json")
    (tmp_path / "prekeys.json").mkdir()
    with pytest.raises(CapacityError, match=r"prekeys\.json"):
        store.rotate(NOW_S)
    assert store.public(NOW_S) == []


def test_prekeys_survive_a_restart(tmp_path: Path) -> None:
    store = PrekeyStore(tmp_path / "prekeys.json")
    store.rotate(NOW_S)
    again = PrekeyStore(tmp_path / "prekeys.json")
    for prekey in store.public(NOW_S):
        private = again.find(prekey.suite, prekey.prekey_id, NOW_S)
        assert private is not None
        assert private.public == prekey.public
    assert not again.rotate(NOW_S)


def test_a_damaged_prekey_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "prekeys.json"
    path.write_text('{"prekeys": [{"suite": 1}]}')
    path.chmod(0o600)
    with pytest.raises(IdentityError, match=r"prekeys\.json"):
        PrekeyStore(path)
