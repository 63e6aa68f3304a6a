"""The sealed envelope, version 1: bytes in, bytes out, no clock, no socket.

One decision explains the rest: HPKE only wraps a random secret K, and everything else is derived
from K with HKDF, so that a stream of chunks needs no HPKE context and any gateway worker that
holds the prekey can serve any request. Big-endian everywhere; docs/link-format.md has it all::

    H         "TG" | version u8 = 1 | suite u8 | prekey_id[8] | request_id[16] | attempt u16
    REQUEST   0x01 | H | wrap | flags u8                                  | chunk 0 of Q
    PART      0x04 | request_id[16] | attempt u16 | n u64 | flags u8      | chunk n of Q
    RESPONSE  0x02 | request_id[16] | attempt u16 | n u64 | flags u8 | W? | chunk n of R
    CONTROL   0x03 | request_id[16] | attempt u16 | n u64                 | chunk n of C

    wrap      HPKE[suite](K, prekey, info = "tidegate/1 wrap" | SHA256(H))               RFC 9180
    chunk 0   device_id[16] | E[32] | body_bytes u32 | SHA256(body)[32] | sig[64] | body ...
    W?        W[32] | signature[64], in chunks whose flags say SIGNED

Chunks are in `chunks`, secrets and signatures in `transcript`. E is fresh for every attempt and W
for every attempt a gateway opens, so no key ever sees a nonce twice. Whatever fails to open is
one `SealError` without a reason.
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NewType

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from tidegate.errors import RequestError, SealError
from tidegate.link.chunks import (
    FINAL,
    SIGNED,
    ChunkStream,
    padded_chunk_bytes,
    padded_request_bytes,
)
from tidegate.link.suites import PublicPrekey
from tidegate.link.transcript import (
    device_signs,
    gateway_signs,
    request_root,
    response_root,
    sha256,
    wrap_info,
)
from tidegate.link.wire import (
    CHUNK_HEAD,
    CONTROL_HEAD,
    FRAGMENT_BYTES,
    HEADER,
    MAGIC,
    MAX_BODY_BYTES,
    MAX_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    OPENING,
    ROUTE,
    VERSION,
    WHO_ANSWERS,
)

RequestId = NewType("RequestId", bytes)
"""16 bytes: 48-bit Unix time in ms, then 80 random bits."""
REQUEST_ID_BYTES = 16
DeviceId = NewType("DeviceId", bytes)
"""16 random bytes, known to the two ends only."""
UNREADABLE = (InvalidTag, InvalidSignature, ValueError, TypeError, LookupError, struct.error)
"""Whatever a message can make go wrong; all of it becomes the one error."""


class MessageType(IntEnum):
    """First byte of every MQTT payload on a request or response topic."""

    REQUEST = 1
    RESPONSE = 2
    CONTROL = 3
    PART = 4


@dataclass(frozen=True, slots=True)
class Route:
    """What a message says in clear about where it belongs. Believe nothing before it opens."""

    kind: MessageType
    request_id: RequestId
    attempt: int


def route(message: bytes) -> Route:
    """Read the clear part that every message has.

    Raises:
        SealError: too short, or of an unknown type.
    """
    try:
        if message[0] == MessageType.REQUEST:
            magic, version, _, _, request_id, attempt = HEADER.unpack_from(message, 1)
            if magic != MAGIC or version != VERSION:
                raise SealError
            return Route(MessageType.REQUEST, RequestId(request_id), attempt)
        kind, request_id, attempt = ROUTE.unpack_from(message)
        return Route(MessageType(kind), RequestId(request_id), attempt)
    except UNREADABLE:
        raise SealError from None


def read_head(
    message: bytes, head: struct.Struct, own: tuple[MessageType, RequestId, int]
) -> tuple[int, ...]:
    """What the head of a message says after its type, request and attempt, which must be `own`.

    Raises:
        SealError: it is too large, or belongs elsewhere.
        struct.error: it is too short.
    """
    if len(message) > MAX_MESSAGE_BYTES:
        raise SealError
    fields = head.unpack_from(message)
    if fields[:3] != own:
        raise SealError
    return fields[3:]


def new_request_id(unix_ms: int) -> RequestId:
    """A fresh id; `unix_ms` lets a gateway refuse ids older than the rows it keeps."""
    return RequestId(unix_ms.to_bytes(6, "big") + secrets.token_bytes(10))


def request_time_ms(request_id: bytes) -> int:
    """The Unix time in ms at which `request_id` was made."""
    return int.from_bytes(request_id[:6], "big")


@dataclass(kw_only=True, slots=True)
class DeviceAttempt:
    """The device's keys of one attempt: seals controls, opens the answer."""

    request_id: RequestId
    attempt: int
    handle: str
    _transcript: bytes = field(repr=False)
    _secret: bytes = field(repr=False)
    _ephemeral: X25519PrivateKey = field(repr=False)
    _gateway_key: Ed25519PublicKey = field(repr=False)
    _control: ChunkStream = field(repr=False)
    _answering: tuple[bytes, ChunkStream] | None = field(default=None, repr=False)
    """Who answers, W and signature as verified, and the stream that follows from it."""

    def seal_control(self, data: bytes) -> bytes:
        """Seal an acknowledgement or a cancellation on a stream of its own."""
        n, ciphertext = self._control.seal(
            data, flags=0, padded_bytes=padded_chunk_bytes(len(data))
        )
        head = CONTROL_HEAD.pack(MessageType.CONTROL, self.request_id, self.attempt, n)
        return head + ciphertext

    def open_response(self, message: bytes) -> tuple[int, bool, bytes]:
        """Open one chunk of the answer.

        Chunks without W open once one with it has been; a gateway repeats it until it has heard
        a control.

        Returns:
            Its number in this attempt's stream, the FINAL flag, and the data. No data means a
            filler: its number counts, nothing else of it does.

        Raises:
            SealError: anything about it is wrong.
        """
        try:
            own = (MessageType.RESPONSE, self.request_id, self.attempt)
            n, flags = read_head(message, CHUNK_HEAD, own)
            who, start = None, CHUNK_HEAD.size
            if flags & SIGNED:
                start += WHO_ANSWERS.size
                who = message[CHUNK_HEAD.size : start]
            answering = self._stream(who)
            data = answering[1].open(n, flags, message[start:])
        except UNREADABLE:
            raise SealError from None
        self._answering = answering
        return n, bool(flags & FINAL), data

    def _stream(self, who: bytes | None) -> tuple[bytes, ChunkStream]:
        """The stream for W; only one that opened something is kept (in `open_response`)."""
        if self._answering is not None and who in (None, self._answering[0]):
            return self._answering
        if who is None:
            raise SealError
        public, signature = WHO_ANSWERS.unpack(who)
        signed = gateway_signs(self._transcript, public, self.request_id, self.attempt)
        self._gateway_key.verify(signature, signed)
        shared = self._ephemeral.exchange(X25519PublicKey.from_public_bytes(public))
        root = response_root(self._transcript, public, self._secret, shared)
        return who, ChunkStream(root, b"R", self.request_id, self.attempt, self.handle)


def seal_request(
    body: bytes,
    *,
    request_id: RequestId,
    attempt: int,
    prekey_id: bytes,
    prekey: PublicPrekey,
    gateway_key: Ed25519PublicKey,
    device_id: DeviceId,
    device_key: Ed25519PrivateKey,
    handle: str,
) -> tuple[list[bytes], DeviceAttempt]:
    """Seal `body` for the holder of `prekey`.

    Args:
        body: at most `MAX_BODY_BYTES`.
        request_id: the same for every attempt.
        attempt: 0 to 65535, never used twice for one `request_id`.
        prekey_id: 8 bytes from the gateway's advert.
        prekey: the advert's public key; the suite is its.
        gateway_key: the key that signed the advert, and must sign the answer.
        device_id: known to the gateway; travels encrypted.
        device_key: signs the transcript; the signature travels encrypted.
        handle: the device's topic handle, bound into every chunk.

    Returns:
        The messages to send in this order, one or more, and the keys to follow them with.

    Raises:
        RequestError: the body is too large.
    """
    if len(body) > MAX_BODY_BYTES:
        raise RequestError(
            "body", f"{len(body)} bytes: must be at most {MAX_BODY_BYTES}", status=413
        )
    header = HEADER.pack(MAGIC, VERSION, prekey.suite, prekey_id, request_id, attempt)
    secret = secrets.token_bytes(32)
    ephemeral = X25519PrivateKey.generate()
    wrap = prekey.wrap(secret, wrap_info(header))
    transcript = sha256(header + wrap)
    root = request_root(transcript, secret)
    public = ephemeral.public_key().public_bytes_raw()
    opening = _opening(transcript, public, body, device_id, device_key)
    chunks = _seal_fragments(opening + body, ChunkStream(root, b"Q", request_id, attempt, handle))
    parts = [
        CHUNK_HEAD.pack(MessageType.PART, request_id, attempt, n, flags) + ciphertext
        for n, flags, ciphertext in chunks[1:]
    ]
    _, flags, ciphertext = chunks[0]
    first = bytes((MessageType.REQUEST,)) + header + wrap + bytes((flags,)) + ciphertext
    return [first, *parts], DeviceAttempt(
        request_id=request_id,
        attempt=attempt,
        handle=handle,
        _transcript=transcript,
        _secret=secret,
        _ephemeral=ephemeral,
        _gateway_key=gateway_key,
        _control=ChunkStream(root, b"C", request_id, attempt, handle),
    )


def _opening(
    transcript: bytes,
    ephemeral: bytes,
    body: bytes,
    device_id: DeviceId,
    device_key: Ed25519PrivateKey,
) -> bytes:
    """What stream Q begins with: who speaks, E, and the signature over both and the body."""
    digest = sha256(body)
    signature = device_key.sign(device_signs(transcript, ephemeral, len(body), digest))
    return OPENING.pack(device_id, ephemeral, len(body), digest, signature)


def _seal_fragments(content: bytes, stream: ChunkStream) -> list[tuple[int, int, bytes]]:
    """Number, flags and ciphertext of every chunk; all are of full size if there are several."""
    several = len(content) > FRAGMENT_BYTES
    chunks = []
    for start in range(0, len(content), FRAGMENT_BYTES):
        data = content[start : start + FRAGMENT_BYTES]
        flags = FINAL if start + len(data) == len(content) else 0
        padded_bytes = padded_request_bytes(FRAGMENT_BYTES if several else len(data))
        n, ciphertext = stream.seal(data, flags=flags, padded_bytes=padded_bytes)
        chunks.append((n, flags, ciphertext))
    return chunks


@dataclass(kw_only=True, slots=True)
class GatewayAttempt:
    """The gateway's keys of one attempt: opens controls, seals the answer."""

    device_id: DeviceId
    request_id: RequestId
    attempt: int
    body: bytes = field(repr=False)
    _who_answers: bytes = field(repr=False)
    _control: ChunkStream = field(repr=False)
    _response: ChunkStream = field(repr=False)
    _last_control: int = field(default=-1, repr=False)

    def seal_response(self, data: bytes, *, final: bool, at_least_bytes: int = 0) -> bytes:
        """Seal the next chunk of the answer; its number is `sealed` before the call.

        Args:
            data: nothing makes a filler, which the device opens and then ignores.
            final: the stream ends with this chunk.
            at_least_bytes: plaintext size to pad to, for chunks that must all look alike.
        """
        # A change of size would tell when the first control came.
        alike = at_least_bytes > 0
        who = self._who_answers if alike or self._last_control < 0 else b""
        flags = (FINAL if final else 0) | (SIGNED if who else 0)
        padded_bytes = padded_chunk_bytes(len(data), at_least_bytes)
        assert padded_bytes <= MAX_CHUNK_BYTES, "answers are cut to size before they get here"
        n, ciphertext = self._response.seal(data, flags=flags, padded_bytes=padded_bytes)
        head = CHUNK_HEAD.pack(MessageType.RESPONSE, self.request_id, self.attempt, n, flags)
        return head + who + ciphertext

    @property
    def sealed(self) -> int:
        """Chunks sealed so far, which is the number of the next one."""
        return self._response.next_n

    def open_control(self, message: bytes) -> bytes:
        """Open an acknowledgement or a cancellation.

        Controls are cumulative, so one older than the last opened is refused: that is the whole
        replay protection they need.

        Raises:
            SealError: anything about it is wrong, or it is not newer than the last one.
        """
        try:
            own = (MessageType.CONTROL, self.request_id, self.attempt)
            (n,) = read_head(message, CONTROL_HEAD, own)
            if n <= self._last_control:
                raise SealError
            data = self._control.open(n, 0, message[CONTROL_HEAD.size :])
        except UNREADABLE:
            raise SealError from None
        self._last_control = n
        return data
