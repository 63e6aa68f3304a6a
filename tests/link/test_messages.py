"""What is said inside the envelope: it survives the trip, and junk does not get in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.link.messages import (
    CALL_BYTES,
    MAX_BUNDLE_BYTES,
    MAX_BUNDLE_PAYLOADS,
    Bundle,
    Call,
    Control,
    ControlKind,
    Prefix,
    Status,
    bundle_from,
    same_but_last,
)

counts = st.integers(0, 2**32 - 1)
credits_ = st.integers(0, 2**16 - 1)
payload_lists = st.lists(st.binary(max_size=40), max_size=20)


@given(counts, credits_, counts, payload_lists, st.binary(max_size=100))
def test_a_call_survives_the_trip(
    have: int, credit: int, ttl_ms: int, held: list[bytes], body: bytes
) -> None:
    proof = Prefix(held).proof()
    call = Call(have=have, credit=credit, ttl_ms=ttl_ms, proof=proof, body=body)
    assert len(call.encode()) == CALL_BYTES + len(body)
    assert Call.decode(call.encode()) == call


@given(counts, payload_lists, st.sampled_from(Status))
def test_a_bundle_survives_the_trip(first: int, payloads: list[bytes], status: Status) -> None:
    code = "over_capacity" if status is Status.FAILED else ""
    bundle = Bundle(first=first, payloads=tuple(payloads), status=status, code=code)
    assert Bundle.decode(bundle.encode()) == bundle


@given(st.sampled_from(ControlKind), counts, credits_, st.integers(0, 2**64 - 1), st.booleans())
def test_a_control_survives_the_trip(
    kind: ControlKind, have: int, credit: int, seen: int, rewind: bool
) -> None:
    control = Control(kind=kind, have=have, credit=credit, seen=seen, rewind=rewind)
    assert Control.decode(control.encode()) == control


@given(st.binary(max_size=300))
def test_junk_is_parsed_to_a_value_or_refused(data: bytes) -> None:
    for decode in (Call.decode, Bundle.decode, Control.decode):
        try:
            value = decode(data)
        except ValueError:
            continue
        assert value.encode() == data


def test_a_call_looks_like_this_on_the_wire() -> None:
    call = Call(have=3, credit=32, ttl_ms=1500, proof=Prefix([b"a", b"b", b"c"]).proof(), body=b"x")
    assert call.encode().hex() == (
        "000000030020000005dce5a01fee14e0ed5c48714f22180f25ad2e7d2c03a9507ae265ecf5b5356885a578"
    )


@given(payload_lists, payload_lists)
def test_a_proof_tells_answers_apart_and_the_last_payload_from_those_before(
    ours: list[bytes], theirs: list[bytes]
) -> None:
    one, other = Prefix(ours).proof(), Prefix(theirs).proof()
    assert (one == other) == (ours == theirs)
    if len(ours) == len(theirs):
        assert same_but_last(one, other) == (ours[:-1] == theirs[:-1])


def test_an_error_code_comes_with_a_failure_and_only_then() -> None:
    with pytest.raises(ValueError, match="code"):
        Bundle.decode(Bundle(first=0, status=Status.FAILED).encode())
    with pytest.raises(ValueError, match="code"):
        Bundle.decode(Bundle(first=0, status=Status.COMPLETE, code="x").encode())


@given(st.lists(st.integers(0, 60_000), max_size=30), st.integers(0, 30))
def test_a_bundle_takes_what_fits_and_never_nothing(sizes: list[int], first: int) -> None:
    payloads = [bytes(size) for size in sizes]
    taken = bundle_from(payloads, first)
    assert list(taken) == payloads[first : first + len(taken)]
    assert bool(taken) == (first < len(payloads))
    assert sum(len(payload) + 4 for payload in taken) <= MAX_BUNDLE_BYTES


def test_a_bundle_of_tiny_payloads_is_bounded_by_their_number() -> None:
    assert len(bundle_from([b""] * 5000, 0)) == MAX_BUNDLE_PAYLOADS


def test_no_repr_shows_content() -> None:
    values = (
        Call(have=0, credit=1, ttl_ms=1, body=b"secret"),
        Bundle(first=0, payloads=(b"secret",)),
    )
    assert "secret" not in repr(values)
