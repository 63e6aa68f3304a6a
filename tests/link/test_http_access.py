"""Who may use a handle over HTTP: signed for one gateway, one stream, one body, and once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import DeviceRefusedError, IdentityError
from tidegate.link.fleet import add_device, pair
from tidegate.link.http_access import (
    CHALLENGE_S,
    WINDOW,
    Challenges,
    NumberWindow,
    header,
    read_header,
    sign_send,
    sign_stream,
)
from tidegate.link.http_door import HttpDoor
from tidegate.link.identity import DeviceIdentity, load_device
from tidegate.link.registry import DeviceRegistry

CHALLENGE = bytes(range(40))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet")
    pair(folder / "device", folder / "gateway")
    gateway = folder / "gateway"
    add_device(gateway / "fleet", folder / "other", [gateway])
    add_device(gateway / "fleet", folder / "revoked", [gateway])
    registry = DeviceRegistry(gateway / "devices.sqlite")
    registry.revoke(load_device(folder / "revoked").device_id)
    registry.close()
    return folder


@pytest.fixture
def door(fleet: Path) -> Iterator[HttpDoor]:
    door = HttpDoor(fleet / "gateway")
    yield door
    door.close()


@pytest.fixture(scope="module")
def device(fleet: Path) -> DeviceIdentity:
    return load_device(fleet / "device")


def test_a_device_opens_its_own_stream(door: HttpDoor, device: DeviceIdentity) -> None:
    statement = sign_stream(device, "gw0", CHALLENGE)
    name, came = read_header(header(device.handle, statement))
    assert (name, came) == (device.handle, statement)
    assert door.open_stream(name, came) == CHALLENGE


def test_nobody_opens_anothers_stream(door: HttpDoor, device: DeviceIdentity, fleet: Path) -> None:
    other = load_device(fleet / "other")
    forged = replace(device, key=other.key)
    for statement in (
        sign_stream(other, "gw0", CHALLENGE),
        sign_stream(forged, "gw0", CHALLENGE),
        sign_stream(replace(device, key=Ed25519PrivateKey.generate()), "gw0", CHALLENGE),
    ):
        with pytest.raises(IdentityError):
            door.open_stream(device.handle, statement)
    with pytest.raises(IdentityError):
        door.open_stream("f" * 32, sign_stream(device, "gw0", CHALLENGE))


@pytest.mark.parametrize("gateway", ["gw1", "gw0x", ""])
def test_a_claim_is_for_one_gateway(door: HttpDoor, device: DeviceIdentity, gateway: str) -> None:
    with pytest.raises(IdentityError, match="gateway"):
        door.open_stream(device.handle, sign_stream(device, gateway, CHALLENGE))


def test_a_claim_is_for_one_group(door: HttpDoor, device: DeviceIdentity) -> None:
    with pytest.raises(IdentityError, match="group"):
        door.open_stream(
            device.handle, sign_stream(replace(device, group="away"), "gw0", CHALLENGE)
        )


def test_a_revoked_device_is_told_so_once_it_has_proved_who_it_is(
    door: HttpDoor, device: DeviceIdentity, fleet: Path
) -> None:
    revoked = load_device(fleet / "revoked")
    with pytest.raises(DeviceRefusedError):
        door.open_stream(revoked.handle, sign_stream(revoked, "gw0", CHALLENGE))
    with pytest.raises(IdentityError) as caught:
        door.open_stream(revoked.handle, sign_stream(device, "gw0", CHALLENGE))
    assert not isinstance(caught.value, DeviceRefusedError)
    handles = [device.handle, revoked.handle, "f" * 32]
    assert door.refused(handles) == {revoked.handle: "device_revoked", "f" * 32: "unknown"}


def test_a_word_is_for_one_body_of_one_stream(door: HttpDoor, device: DeviceIdentity) -> None:
    said = sign_send(device, "gw0", CHALLENGE, number=7, body=b"body")
    assert door.take_send(device.handle, CHALLENGE, said, b"body") == 7
    with pytest.raises(IdentityError, match="body"):
        door.take_send(device.handle, CHALLENGE, said, b"bodY")
    with pytest.raises(IdentityError, match="challenge"):
        door.take_send(device.handle, bytes(40), said, b"body")
    claim = sign_stream(device, "gw0", CHALLENGE)
    with pytest.raises(IdentityError):
        door.take_send(device.handle, CHALLENGE, claim, b"body")
    with pytest.raises(IdentityError):
        door.open_stream(device.handle, said)


def test_every_flipped_bit_of_a_claim_is_refused(door: HttpDoor, device: DeviceIdentity) -> None:
    statement = sign_stream(device, "gw0", CHALLENGE)
    for at in range(len(statement)):
        damaged = bytearray(statement)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(IdentityError):
            door.open_stream(device.handle, bytes(damaged))


def test_a_challenge_is_good_once_and_not_for_long() -> None:
    challenges = Challenges()
    first, second = challenges.issue(100.0), challenges.issue(100.0)
    challenges.redeem(100.0, first)
    with pytest.raises(IdentityError):
        challenges.redeem(100.1, first)
    with pytest.raises(IdentityError):
        challenges.redeem(100.0 + CHALLENGE_S, second)
    challenges.redeem(100.0 + CHALLENGE_S - 0.1, second)
    with pytest.raises(IdentityError):
        challenges.redeem(100.0, Challenges().issue(100.0))


def test_challenges_that_are_too_old_are_not_remembered() -> None:
    challenges = Challenges()
    for now_s in range(200):
        challenges.redeem(float(now_s), challenges.issue(float(now_s)))
    assert len(challenges._redeemed) <= CHALLENGE_S + 1


@given(st.binary(max_size=60))
def test_what_is_no_challenge_is_refused(junk: bytes) -> None:
    with pytest.raises(IdentityError):
        Challenges().check(0.0, junk)


@given(st.lists(st.integers(0, 3 * WINDOW), max_size=200))
def test_a_number_counts_once_and_never_far_behind(numbers: list[int]) -> None:
    window, taken = NumberWindow(), set[int]()
    for number in numbers:
        highest = max(taken, default=-1)
        fresh = number not in taken and number > highest - WINDOW
        assert window.take(number) is fresh
        if fresh:
            taken.add(number)


def test_a_jump_in_numbers_costs_nothing() -> None:
    window = NumberWindow()
    assert window.take(2**53 - 1)
    assert not window.take(2**53 - 1)
    assert not window.take(0)


@given(st.from_regex(r"[A-Za-z0-9_-]{1,128}", fullmatch=True), st.binary(min_size=1, max_size=2048))
def test_a_header_brings_its_name_and_statement(name: str, statement: bytes) -> None:
    assert read_header(header(name, statement)) == (name, statement)


@given(st.from_regex(r"(Tidegate |tidegate )?[A-Za-z0-9_=. -]{0,80}", fullmatch=True))
def test_a_header_is_understood_or_refused(value: str) -> None:
    try:
        name, statement = read_header(value)
    except IdentityError:
        return
    assert read_header(header(name, statement)) == (name, statement)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Tidegate",
        "Bearer a.YQ==",
        "Tidegate a",
        "Tidegate a.",
        "Tidegate a.Y",
        "Tidegate a.b.c",
    ],
)
def test_a_header_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(IdentityError, match="Authorization"):
        read_header(value)
