"""Server-sent events: what was encoded is decoded, however the bytes are cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.api.sse import DONE, HEARTBEAT, Decoder, encode
from tidegate.errors import UnavailableError


@given(st.lists(st.text(max_size=20), max_size=6), st.integers(1, 7), st.booleans())
@settings(deadline=None, max_examples=200)
def test_events_survive_any_cut(texts: list[str], step: int, windows: bool) -> None:
    sent = HEARTBEAT.join([b"", *(encode({"text": one}) for one in texts), DONE])
    if windows:
        sent = sent.replace(b"\n", b"\r\n")
    decoder = Decoder()
    got = [
        data
        for start in range(0, len(sent), step)
        for data in decoder.feed(sent[start : start + step])
    ]
    assert [json.loads(one)["text"] for one in got[:-1]] == texts
    assert got[-1] == "[DONE]"


@given(st.lists(st.binary(max_size=30), max_size=8))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_events_or_an_unavailable_error(chunks: list[bytes]) -> None:
    decoder = Decoder(most_bytes=40)
    try:
        for chunk in chunks:
            list(decoder.feed(chunk))
    except UnavailableError:
        return


def test_data_lines_join_and_other_fields_are_ignored() -> None:
    got = list(Decoder().feed(b"event: x\nid: 1\ndata: a\ndata:b\n\n: comment\n\ndata\n\n"))
    assert got == ["a\nb", ""]


@pytest.mark.parametrize("flood", [b"x" * 101, b"data: " + b"x" * 101 + b"\n", b"data: x\n" * 101])
def test_an_endless_event_is_refused(flood: bytes) -> None:
    with pytest.raises(UnavailableError, match="over 100 bytes"):
        list(Decoder(most_bytes=100).feed(flood))
