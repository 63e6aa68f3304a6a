"""JSON that is written in pieces: the same, from another thread."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.api.long_json import long_json

_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # What comes from a model is valid Unicode.
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


@given(_VALUES)
def test_pieces_read_back_as_the_value(value: object) -> None:
    for _ in range(7):  # deeper than what is written child by child
        value = {"é": [value, 1]}
    assert json.loads(asyncio.run(long_json(lambda: value))) == value


def test_it_is_made_and_written_in_another_thread() -> None:
    made_by: list[int] = []

    def make() -> object:
        made_by.append(threading.get_ident())
        return {}

    assert asyncio.run(long_json(make)) == b"{}"
    assert made_by != [threading.get_ident()]


def test_a_number_that_json_cannot_say_is_an_error() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        asyncio.run(long_json(lambda: {"a": [float("nan")]}))
