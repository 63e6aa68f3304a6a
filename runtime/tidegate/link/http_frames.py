"""Messages in an HTTP body: `kind u8 | length u32 | data`, big-endian, one after another.

The same frames go both ways: in the body of a POST towards the gateway, in the endless body of a
GET towards the device. A kind that is unknown is skipped, so that a newer peer may say more.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum

from tidegate.errors import LinkError
from tidegate.link.wire import MAX_MESSAGE_BYTES

HEAD = struct.Struct(">BI")
POST_BYTES = 256 * 1024
"""Of frames in one POST at most: what waits is sent together."""


class Kind(IntEnum):
    """What a frame holds."""

    BEAT = 0
    """Nothing: the stream lives."""
    MESSAGE = 1
    """A sealed message: to the gateway in a POST, to the device in a stream."""
    ADVERT = 2
    """The gateway's signed advert."""
    BYE = 3
    """The last one: a code that says why the stream ends."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame."""

    kind: Kind
    data: bytes = field(default=b"", repr=False)

    def encode(self) -> bytes:
        """As it travels."""
        assert len(self.data) <= MAX_MESSAGE_BYTES
        return HEAD.pack(self.kind, len(self.data)) + self.data


BEAT = Frame(Kind.BEAT)
_KNOWN = frozenset(int(kind) for kind in Kind)


class FrameSplitter:
    """Bytes in, frames out; holds no more than one frame of the largest size."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._broken = False

    @property
    def clean(self) -> bool:
        """Nothing of a further frame has come."""
        return not self._held and not self._broken

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes.

        Raises:
            LinkError: a frame is larger than any message; nothing more can be understood.
        """
        if self._broken:
            raise LinkError("frame: follows one that could not be understood")
        self._held += data
        frames: list[Frame] = []
        at = 0
        while len(self._held) - at >= HEAD.size:
            kind, length_bytes = HEAD.unpack_from(self._held, at)
            if length_bytes > MAX_MESSAGE_BYTES:
                self._broken = True
                self._held.clear()
                raise LinkError(f"frame: {length_bytes} bytes: must be at most {MAX_MESSAGE_BYTES}")
            end = at + HEAD.size + length_bytes
            if len(self._held) < end:
                break
            if kind in _KNOWN:
                frames.append(Frame(Kind(kind), bytes(self._held[at + HEAD.size : end])))
            at = end
        del self._held[:at]
        return frames


def split(body: bytes) -> list[Frame]:
    """The frames of a whole body.

    Raises:
        LinkError: it is not a row of whole frames.
    """
    splitter = FrameSplitter()
    frames = splitter.feed(body)
    if not splitter.clean:
        raise LinkError("body: ends within a frame")
    return frames
