"""Frames in an HTTP body: found again however the bytes were cut, and bounded whatever they say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import LinkError
from tidegate.link.http_frames import HEAD, Frame, FrameSplitter, Kind, split
from tidegate.link.wire import MAX_MESSAGE_BYTES

FRAMES = st.lists(
    st.builds(Frame, st.sampled_from(Kind), st.binary(max_size=40)), min_size=1, max_size=6
)


def encoded(frames: list[Frame]) -> bytes:
    return b"".join(frame.encode() for frame in frames)


def test_a_frame_is_its_kind_its_length_and_its_data() -> None:
    assert Frame(Kind.MESSAGE, b"ab").encode().hex() == "01" + "00000002" + "6162"


@given(FRAMES)
def test_frames_cut_at_every_byte_come_out_the_same(frames: list[Frame]) -> None:
    body = encoded(frames)
    for at in range(len(body) + 1):
        splitter = FrameSplitter()
        assert splitter.feed(body[:at]) + splitter.feed(body[at:]) == frames
        assert splitter.clean
    one_by_one = FrameSplitter()
    assert [frame for byte in body for frame in one_by_one.feed(bytes([byte]))] == frames


@given(FRAMES, st.data())
def test_a_body_that_ends_within_a_frame_is_refused(
    frames: list[Frame], data: st.DataObject
) -> None:
    body = encoded(frames)
    ends = {len(encoded(frames[:count])) for count in range(len(frames) + 1)}
    at = data.draw(st.integers(0, len(body)))
    if at in ends:
        assert encoded(split(body[:at])) == body[:at]
    else:
        with pytest.raises(LinkError, match="within a frame"):
            split(body[:at])


def test_a_kind_that_is_unknown_is_skipped() -> None:
    body = HEAD.pack(99, 3) + b"new" + Frame(Kind.BEAT).encode()
    assert split(body) == [Frame(Kind.BEAT)]


def test_a_frame_larger_than_any_message_is_refused_before_it_is_held() -> None:
    splitter = FrameSplitter()
    with pytest.raises(LinkError, match=str(MAX_MESSAGE_BYTES)):
        splitter.feed(HEAD.pack(Kind.MESSAGE, MAX_MESSAGE_BYTES + 1))
    assert not splitter.clean
    with pytest.raises(LinkError):
        splitter.feed(Frame(Kind.BEAT).encode())


def test_the_largest_message_passes() -> None:
    frame = Frame(Kind.MESSAGE, bytes(MAX_MESSAGE_BYTES))
    assert split(frame.encode()) == [frame]


@given(st.binary(max_size=200))
def test_nothing_that_comes_raises_anything_else(junk: bytes) -> None:
    try:
        frames = split(junk)
    except LinkError:
        return
    assert sum(HEAD.size + len(frame.data) for frame in frames) <= len(junk)
