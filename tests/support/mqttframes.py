"""MQTT 3.1.1 and 5 frames, as much as somebody in the middle needs: sans-I/O, bounded.

A frame is `type and flags u8 | remaining length varint | body` (MQTT 5 section 2.1, the same in
3.1.1). Frames stay bytes; of a PUBLISH it is known where its packet id and its payload lie.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum

LARGEST_FRAME_BYTES = 2 * 1024 * 1024
"""Twice what the link ever sends; a frame that says it is larger ends the connection."""
_DUP = 0x08
_TOPIC_ALIAS = 0x23
_FIXED_BYTES = {0x01: 1, 0x02: 4, _TOPIC_ALIAS: 2}
_STRINGS = {0x03: 1, 0x08: 1, 0x09: 1, 0x26: 2}
"""Properties of a PUBLISH that are u16-counted strings, and of how many (MQTT 5, table 2-4)."""
_SUBSCRIPTION_ID = 0x0B


class FrameError(ValueError):
    """These bytes are not MQTT, or larger than anything legal here."""


class FrameKind(IntEnum):
    """The packet types that matter to somebody in the middle."""

    CONNECT = 1
    PUBLISH = 3
    PUBACK = 4
    PUBREC = 5
    PUBREL = 6
    PUBCOMP = 7
    DISCONNECT = 14


@dataclass(frozen=True, kw_only=True, slots=True)
class Publish:
    """A PUBLISH frame taken apart; `raw` is all of it."""

    raw: bytes = field(repr=False)
    topic: str
    qos: int
    packet_id: int
    """0 at QoS 0, which has none."""
    payload_at: int
    """Where in `raw` the payload begins."""
    aliased: bool
    """It sets or uses a topic alias (MQTT 5): others depend on its arrival, in its place."""

    @property
    def payload(self) -> bytes:
        return self.raw[self.payload_at :]

    def repeated(self) -> bytes:
        """The frame as its sender would send it again."""
        return bytes((self.raw[0] | (_DUP if self.qos else 0),)) + self.raw[1:]

    def damaged(self, place: float, bit: int) -> bytes:
        """The frame with one bit of its payload flipped; `place` is 0 to 1 along the payload."""
        if len(self.raw) == self.payload_at:
            return self.raw
        at = self.payload_at + int(place * (len(self.raw) - self.payload_at))
        damaged = bytearray(self.raw)
        damaged[at] ^= 1 << bit
        return bytes(damaged)


class FrameReader:
    """Cuts a stream of bytes into frames; holds at most one unfinished frame."""

    def __init__(self, largest_bytes: int = LARGEST_FRAME_BYTES) -> None:
        self._largest_bytes = largest_bytes
        self._held = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that `data` completes.

        Raises:
            FrameError: a length that is no varint, or beyond the largest.
        """
        self._held += data
        frames: list[bytes] = []
        while (end := self._frame_end()) is not None and end <= len(self._held):
            frames.append(bytes(self._held[:end]))
            del self._held[:end]
        return frames

    @property
    def held_bytes(self) -> int:
        return len(self._held)

    def _frame_end(self) -> int | None:
        head = read_varint(self._held, 1)
        if head is None:
            return None
        body_bytes, at = head
        if at + body_bytes > self._largest_bytes:
            raise FrameError(f"a frame of {body_bytes} bytes: at most {self._largest_bytes}")
        return at + body_bytes


def read_varint(data: bytes | bytearray, at: int) -> tuple[int, int] | None:
    """The variable byte integer at `at` and where it ends; None when bytes are missing.

    Raises:
        FrameError: more than four bytes (MQTT 5 section 1.5.5).
    """
    value = 0
    for place in range(4):
        if at + place >= len(data):
            return None
        value |= (data[at + place] & 0x7F) << (7 * place)
        if not data[at + place] & 0x80:
            return value, at + place + 1
    raise FrameError("a length of more than four bytes")


def write_varint(value: int) -> bytes:
    """`value` as a variable byte integer."""
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def kind_of(frame: bytes) -> int:
    """The packet type; a `FrameKind` when it matters here."""
    return frame[0] >> 4


def body_of(frame: bytes) -> bytes:
    """What follows the length."""
    head = read_varint(frame, 1)
    assert head is not None, "frames are whole"
    return frame[head[1] :]


def protocol_level(connect: bytes) -> int:
    """4 for MQTT 3.1.1 and 5 for MQTT 5, from a CONNECT."""
    body = body_of(connect)
    return body[2 + int.from_bytes(body[:2], "big")]


def packet_id_of(acknowledgement: bytes) -> int:
    """The packet id of a PUBACK, PUBREC, PUBREL or PUBCOMP."""
    packet_id: int = struct.unpack_from(">H", body_of(acknowledgement))[0]
    return packet_id


def acknowledgement(kind: FrameKind, packet_id: int) -> bytes:
    """A successful PUBACK, PUBREC, PUBREL or PUBCOMP, the same bytes in both versions."""
    flags = 2 if kind is FrameKind.PUBREL else 0
    return struct.pack(">BBH", kind << 4 | flags, 2, packet_id)


def publish(topic: str, payload: bytes, *, qos: int, packet_id: int = 0, level: int = 4) -> bytes:
    """A PUBLISH frame without properties."""
    name = topic.encode()
    body = struct.pack(">H", len(name)) + name
    body += struct.pack(">H", packet_id) if qos else b""
    body += b"\0" if level >= 5 else b""
    body += payload
    return bytes((FrameKind.PUBLISH << 4 | qos << 1,)) + write_varint(len(body)) + body


def parse_publish(frame: bytes, level: int) -> Publish:
    """Take a PUBLISH apart.

    Args:
        frame: a whole frame.
        level: of the connection, from `protocol_level`.

    Raises:
        FrameError: it ends before its payload.
    """
    head = read_varint(frame, 1)
    assert head is not None, "frames are whole"
    at, qos, packet_id, aliased = head[1], frame[0] >> 1 & 3, 0, False
    try:
        (topic_bytes,) = struct.unpack_from(">H", frame, at)
        topic = frame[at + 2 : at + 2 + topic_bytes].decode()
        at += 2 + topic_bytes
        if qos:
            (packet_id,) = struct.unpack_from(">H", frame, at)
            at += 2
        if level >= 5:
            properties = read_varint(frame, at)
            if properties is None:
                raise FrameError("a PUBLISH without its properties")
            at = properties[0] + properties[1]
            aliased = not topic or _has_alias(frame[properties[1] : at])
    except (struct.error, UnicodeDecodeError) as error:
        raise FrameError("a PUBLISH that ends too early") from error
    if at > len(frame):
        raise FrameError("a PUBLISH that ends too early")
    return Publish(
        raw=frame, topic=topic, qos=qos, packet_id=packet_id, payload_at=at, aliased=aliased
    )


def _has_alias(properties: bytes) -> bool:
    at = 0
    while at < len(properties):
        name = properties[at]
        at += 1
        if name == _TOPIC_ALIAS:
            return True
        if name in _FIXED_BYTES:
            at += _FIXED_BYTES[name]
        elif name in _STRINGS:
            for _ in range(_STRINGS[name]):
                at += 2 + int.from_bytes(properties[at : at + 2], "big")
        elif name == _SUBSCRIPTION_ID and (number := read_varint(properties, at)) is not None:
            at = number[1]
        else:
            raise FrameError(f"property {name:#x} in a PUBLISH")
    return False
