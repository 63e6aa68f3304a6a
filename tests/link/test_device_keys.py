"""A device's key and the one after it: who must have signed, and which key a gateway goes by."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import IdentityError
from tidegate.link import statements
from tidegate.link.device_keys import (
    MOST_SUCCESSIONS,
    confirmation,
    confirmed,
    merged_keys,
    open_succession,
    registered,
    succession,
    successions,
)
from tidegate.link.envelope import DeviceId
from tidegate.link.registry import DeviceRecord

NAME = DeviceId(b"device-id-16byte")
KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(1, 25)]
FIRST, SECOND, THIRD, *_ = KEYS


def public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def record(key: Ed25519PrivateKey = FIRST) -> DeviceRecord:
    return DeviceRecord(device_id=NAME, handle="h", public_key=public(key), revoked=False)


def changed(last: int) -> DeviceRecord:
    """A record that went through `KEYS[:last + 1]`, each confirmed."""
    one = record()
    for old, new in pairwise(KEYS[: last + 1]):
        one = confirmed(registered(one, succession(old, new, NAME)), confirmation(new, NAME))
    return one


def test_both_keys_are_good_until_the_new_one_confirms_and_then_only_that() -> None:
    one = registered(record(), succession(FIRST, SECOND, NAME))
    assert one.keys == (public(FIRST), public(SECOND))
    one = confirmed(one, confirmation(SECOND, NAME))
    assert one.keys == (public(SECOND),)


def test_what_is_said_twice_changes_nothing() -> None:
    proof, said = succession(FIRST, SECOND, NAME), confirmation(SECOND, NAME)
    one = registered(record(), proof)
    assert registered(one, proof) == one
    done = confirmed(one, said)
    assert registered(done, proof) == done, "an old answer was lost, the question came again"
    assert confirmed(done, said) == done


def test_a_key_that_was_never_confirmed_gives_way_to_another() -> None:
    one = registered(record(), succession(FIRST, SECOND, NAME))
    one = registered(one, succession(FIRST, THIRD, NAME))
    assert one.keys == (public(FIRST), public(THIRD))
    with pytest.raises(IdentityError, match="not registered"):
        confirmed(one, confirmation(SECOND, NAME))
    assert len(list(successions(one.history))) == 1


@pytest.mark.parametrize(
    "proof",
    [
        succession(SECOND, THIRD, NAME),
        succession(FIRST, SECOND, DeviceId(bytes(16))),
        succession(FIRST, FIRST, NAME),
        succession(FIRST, SECOND, NAME)[64:],
        succession(FIRST, THIRD, NAME)[:64] + succession(FIRST, SECOND, NAME)[64:],
        bytes(64) + succession(FIRST, SECOND, NAME)[64:],
        statements.sign(FIRST, "device key", {}),
        b"",
    ],
    ids=[
        "another key's",
        "another device's",
        "itself",
        "cut",
        "another's consent",
        "no consent",
        "no fields",
        "nothing",
    ],
)
def test_only_the_key_in_use_names_the_next_and_only_if_that_agrees(proof: bytes) -> None:
    with pytest.raises(IdentityError):
        registered(record(), proof)


@given(data=st.data())
def test_no_changed_byte_is_a_succession_or_a_confirmation(data: st.DataObject) -> None:
    proof, said = succession(FIRST, SECOND, NAME), confirmation(SECOND, NAME)
    with pytest.raises(IdentityError):
        registered(record(), damaged(proof, data))
    with pytest.raises(IdentityError):
        confirmed(registered(record(), proof), damaged(said, data))


def damaged(whole: bytes, data: st.DataObject) -> bytes:
    place = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(1, 255))
    return whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :]


def test_a_confirmation_of_another_device_is_none() -> None:
    one = registered(record(), succession(FIRST, SECOND, NAME))
    with pytest.raises(IdentityError):
        confirmed(one, confirmation(SECOND, DeviceId(bytes(16))))


@given(ours=st.integers(0, 6), theirs=st.integers(0, 6), pending=st.booleans())
def test_of_two_gateways_the_one_that_missed_changes_follows_and_never_goes_back(
    ours: int, theirs: int, pending: bool
) -> None:
    here, there = changed(ours), changed(theirs)
    if pending:
        there = registered(there, succession(KEYS[theirs], KEYS[theirs + 1], NAME))
    merged = merged_keys(here, there)
    assert merged.public_key == public(KEYS[max(ours, theirs)])
    assert merged.keys == (there.keys if theirs >= ours else here.keys)
    assert merged_keys(merged, there) == merged


def test_a_key_that_does_not_follow_is_refused_even_by_a_gateway() -> None:
    for stranger in (record(THIRD), replace(record(THIRD), history=changed(1).history)):
        with pytest.raises(IdentityError, match="another key"):
            merged_keys(record(), stranger)


def test_a_history_is_bounded_and_keeps_the_newest() -> None:
    last = MOST_SUCCESSIONS + 3
    proofs = list(successions(changed(last).history))
    assert len(proofs) == MOST_SUCCESSIONS
    assert open_succession(proofs[-1], NAME, public(KEYS[last - 1])) == public(KEYS[last])
    with pytest.raises(IdentityError, match="another key"):
        merged_keys(record(), changed(last))
