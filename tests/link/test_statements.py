"""Signed statements: what was signed comes back, and the right key may still say nonsense."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import IdentityError
from tidegate.link import statements

KEY = Ed25519PrivateKey.generate()
LABEL = "advert"
values = st.one_of(st.integers(0, statements.MOST), st.text(), st.booleans(), st.none())


def signed(data: bytes) -> bytes:
    """`data` under a right signature, whatever it is."""
    return KEY.sign(b"tidegate/1 advert\0" + data) + data


@given(st.dictionaries(st.text(max_size=8), values, max_size=5))
def test_what_was_signed_comes_back(fields: dict[str, object]) -> None:
    statement = statements.sign(KEY, LABEL, fields)
    assert statements.verify(KEY.public_key(), LABEL, statement) == fields


def test_a_statement_of_one_kind_is_none_of_another() -> None:
    statement = statements.sign(KEY, LABEL, {})
    with pytest.raises(IdentityError, match="pinned key"):
        statements.verify(KEY.public_key(), "gateway certificate", statement)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 60_000, b'{"a":' * 9_000, b"1" * 5_000]
)
def test_nonsense_under_a_right_signature_is_refused(data: bytes) -> None:
    with pytest.raises(IdentityError, match="must be"):
        statements.verify(KEY.public_key(), LABEL, signed(data))


@pytest.mark.parametrize(
    "value",
    [None, True, -1, 0.5, "1", [], 2**53, 10**400, float("inf"), float("nan")],
    ids=repr,
)
def test_an_integer_is_one_that_every_reader_agrees_on(value: object) -> None:
    with pytest.raises(IdentityError, match="field: must be an integer from 0 to"):
        statements.integer({"field": value}, "field")


@pytest.mark.parametrize(
    "value", [None, True, "1", 2**53, -(10**400), float("inf"), float("nan")], ids=repr
)
def test_a_number_is_finite(value: object) -> None:
    with pytest.raises(IdentityError, match="field: must be a number"):
        statements.number({"field": value}, "field")


@pytest.mark.parametrize("value", [None, 7, b"x", "\ud800"], ids=ascii)
def test_a_text_is_one_that_can_be_written(value: object) -> None:
    with pytest.raises(IdentityError, match="field: must be"):
        statements.text({"field": value}, "field")


def test_numbers_at_their_bounds_are_read() -> None:
    fields = {"most": statements.MOST, "least": 0, "half": -0.5}
    assert statements.integer(fields, "most") == statements.MOST
    assert statements.integer(fields, "least") == 0
    assert statements.number(fields, "half") == -0.5
