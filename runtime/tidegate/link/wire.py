"""How messages are laid out: the clear heads as structs, and how large anything may be.

Big-endian everywhere; docs/link-format.md explains the fields.
"""

from __future__ import annotations

import struct

from tidegate.link.chunks import CHUNK_MULTIPLE, LENGTH_BYTES, REQUEST_BUCKETS, TAG_BYTES

MAGIC = b"TG"
VERSION = 1

HEADER = struct.Struct(">2sBB8s16sH")
"""H: magic, version, suite, prekey id, request id, attempt."""
CHUNK_HEAD = struct.Struct(">B16sHQB")
"""Of a PART or a RESPONSE: type, request id, attempt, n, flags."""
CONTROL_HEAD = struct.Struct(">B16sHQ")
"""Type, request id, attempt, n."""
ROUTE = struct.Struct(">B16sH")
"""What all of them but a REQUEST start with."""
OPENING = struct.Struct(">16s32sI32s64s")
"""Start of a request's plaintext: device id, E, length and digest of the body, signature."""
WHO_ANSWERS = struct.Struct(">32s64s")
"""W and the gateway's signature over it."""

MAX_MESSAGE_BYTES = 96 * 1024
"""No MQTT payload is larger, adverts included (AWS IoT stops at 128 KB)."""
FRAGMENT_BYTES = REQUEST_BUCKETS[-1] - LENGTH_BYTES
"""Data of every chunk of a request but the last."""
MAX_FRAGMENTS = 16
MAX_BODY_BYTES = MAX_FRAGMENTS * FRAGMENT_BYTES - OPENING.size
_RESPONSE_ROOM_BYTES = MAX_MESSAGE_BYTES - CHUNK_HEAD.size - WHO_ANSWERS.size - TAG_BYTES
MAX_CHUNK_BYTES = _RESPONSE_ROOM_BYTES // CHUNK_MULTIPLE * CHUNK_MULTIPLE
"""Padded plaintext of one chunk of an answer."""


def fragments(content_bytes: int) -> int:
    """How many chunks a request of so many bytes has, opening included."""
    return -(-content_bytes // FRAGMENT_BYTES)
