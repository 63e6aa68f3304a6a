"""The sealed envelope, version 1: bytes in, bytes out, no clock, no socket.

One decision explains the rest: HPKE only wraps a random secret K, and everything else is derived
from K with HKDF, so that a stream of chunks needs no HPKE context and any gateway worker that
holds the prekey can serve any request. Big-endian everywhere::

    H         "TG" | version u8 = 1 | suite u8 | prekey_id[8] | request_id[16] | attempt u16
    REQUEST   0x01 | H | wrap | chunk 0 of Q, FINAL
    RESPONSE  0x02 | request_id[16] | attempt u16 | W_pub[32] | n u64 | FINAL u8 | chunk n of R
    CONTROL   0x03 | request_id[16] | attempt u16 | n u64                | chunk n >= 1 of Q

    wrap      HPKE[suite](K, prekey, info = "tidegate/1 wrap" | SHA256(H))               RFC 9180
    th        SHA256(H | wrap)
    Q         root = HKDF-Extract(th, K);     chunk 0 = device_id[16] | E[32] | sig[64] | body
    R         root = HKDF-Extract(SHA256(th | W), K | X25519(W, E))

Chunks and their keys are in `chunks`. E is fresh for every attempt and W for every attempt a
gateway opens, so no key ever sees a nonce twice. Whatever fails to open is one `SealError` without
a reason.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import NewType

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tidegate.errors import RequestError, SealError
from tidegate.link.chunks import (
    LABEL,
    LENGTH_BYTES,
    REQUEST_BUCKETS,
    TAG_BYTES,
    ChunkStream,
    padded_chunk_bytes,
    padded_request_bytes,
)

RequestId = NewType("RequestId", bytes)
"""16 bytes: 48-bit Unix time in ms, then 80 random bits."""
REQUEST_ID_BYTES = 16
DeviceId = NewType("DeviceId", bytes)
"""16 random bytes, known to the two ends only."""

VERSION = 1
_HEADER = struct.Struct(">2sBB8s16sH")
_RESPONSE = struct.Struct(">B16sH32sQB")
_CONTROL = struct.Struct(">B16sHQ")
_ROUTE = struct.Struct(">B16sH")
_PREFIX_BYTES = 16 + 32 + 64
_KIB = 1024

MAX_REQUEST_BYTES = 15 * 64 * _KIB
"""Padded request plaintext; a whole message stays under 1 MB, EMQX's default packet limit."""
MAX_BODY_BYTES = MAX_REQUEST_BYTES - LENGTH_BYTES - _PREFIX_BYTES
MAX_CHUNK_BYTES = 96 * _KIB
"""Padded chunk plaintext of an answer (AWS IoT stops at 128 KB per message)."""

MAX_MESSAGE_BYTES = 1 + _HEADER.size + 2048 + MAX_REQUEST_BYTES + TAG_BYTES
"""A whole message with room for the largest wrap; nothing legal is larger, adverts included."""


class MessageType(IntEnum):
    """First byte of every MQTT payload on a request or response topic."""

    REQUEST = 1
    RESPONSE = 2
    CONTROL = 3


@dataclass(frozen=True, slots=True)
class Suite:
    """A way to wrap K for a prekey. The number is on the wire and in the signed advert."""

    number: int
    hpke: hpke.Suite
    wrap_bytes: int


SUITES: Mapping[int, Suite] = MappingProxyType(
    {
        1: Suite(
            1,
            hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305),
            wrap_bytes=32 + 32 + TAG_BYTES,
        )
    }
)


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
            magic, version, _, _, request_id, attempt = _HEADER.unpack_from(message, 1)
            if magic != b"TG" or version != VERSION:
                raise SealError
            return Route(MessageType.REQUEST, RequestId(request_id), attempt)
        kind, request_id, attempt = _ROUTE.unpack_from(message)
        return Route(MessageType(kind), RequestId(request_id), attempt)
    except (IndexError, ValueError, struct.error):
        raise SealError from None


def new_request_id(unix_ms: int) -> RequestId:
    """A fresh id; `unix_ms` lets a gateway refuse ids older than the rows it keeps."""
    return RequestId(unix_ms.to_bytes(6, "big") + secrets.token_bytes(10))


def request_time_ms(request_id: bytes) -> int:
    """The Unix time in ms at which `request_id` was made."""
    return int.from_bytes(request_id[:6], "big")


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _request_root(transcript: bytes, secret: bytes) -> bytes:
    return HKDF.extract(hashes.SHA256(), transcript, secret)


def _response_root(transcript: bytes, gateway_public: bytes, secret: bytes, shared: bytes) -> bytes:
    return HKDF.extract(hashes.SHA256(), _sha256(transcript + gateway_public), secret + shared)


def _signed(transcript: bytes, ephemeral: bytes, body: bytes) -> bytes:
    return LABEL + b" sig" + transcript + ephemeral + _sha256(body)


@dataclass(kw_only=True, slots=True)
class DeviceAttempt:
    """The device's keys of one attempt: seals controls, opens the answer."""

    request_id: RequestId
    attempt: int
    handle: str
    _transcript: bytes = field(repr=False)
    _secret: bytes = field(repr=False)
    _ephemeral: X25519PrivateKey = field(repr=False)
    _control: ChunkStream = field(repr=False)
    _response: tuple[bytes, ChunkStream] | None = field(default=None, repr=False)

    def seal_control(self, data: bytes) -> bytes:
        """Seal an acknowledgement or a cancellation on the request's own stream."""
        n, ciphertext = self._control.seal(
            data, final=False, padded_bytes=padded_chunk_bytes(LENGTH_BYTES + len(data))
        )
        head = _CONTROL.pack(MessageType.CONTROL, self.request_id, self.attempt, n)
        return head + ciphertext

    def open_response(self, message: bytes) -> tuple[int, bool, bytes]:
        """Open one chunk of the answer.

        Returns:
            Its number in this attempt's stream, the FINAL flag, and the data.

        Raises:
            SealError: anything about it is wrong.
        """
        if not _RESPONSE.size < len(message) <= _RESPONSE.size + MAX_CHUNK_BYTES + TAG_BYTES:
            raise SealError
        kind, request_id, attempt, public, n, final = _RESPONSE.unpack_from(message)
        if (kind, request_id, attempt) != (MessageType.RESPONSE, self.request_id, self.attempt):
            raise SealError
        try:
            stream = self._response_stream(public)
            data = stream.open(n, final, message[_RESPONSE.size :])
        except (InvalidTag, ValueError):
            raise SealError from None
        self._response = (public, stream)
        return n, bool(final), data

    def _response_stream(self, public: bytes) -> ChunkStream:
        """The stream for W; only one that opened something is kept (in `open_response`)."""
        if self._response is not None and self._response[0] == public:
            return self._response[1]
        shared = self._ephemeral.exchange(X25519PublicKey.from_public_bytes(public))
        root = _response_root(self._transcript, public, self._secret, shared)
        return ChunkStream(root, b"R", self.request_id, self.attempt, self.handle)


def seal_request(
    body: bytes,
    *,
    request_id: RequestId,
    attempt: int,
    suite: int,
    prekey_id: bytes,
    prekey: X25519PublicKey,
    device_id: DeviceId,
    device_key: Ed25519PrivateKey,
    handle: str,
) -> tuple[bytes, DeviceAttempt]:
    """Seal `body` for the holder of `prekey`.

    Args:
        body: at most `MAX_BODY_BYTES`.
        request_id: the same for every attempt.
        attempt: 0 to 65535, never used twice for one `request_id`.
        suite: a key of `SUITES`.
        prekey_id: 8 bytes from the gateway's advert.
        prekey: the advert's public key.
        device_id: known to the gateway; travels encrypted.
        device_key: signs the transcript; the signature travels encrypted.
        handle: the device's topic handle, bound into every chunk.

    Returns:
        The message and the keys to follow it with.

    Raises:
        RequestError: the body is too large.
    """
    if len(body) > MAX_BODY_BYTES:
        raise RequestError(
            "body", f"{len(body)} bytes: must be at most {MAX_BODY_BYTES}", status=413
        )
    header = _HEADER.pack(b"TG", VERSION, suite, prekey_id, request_id, attempt)
    secret = secrets.token_bytes(32)
    ephemeral = X25519PrivateKey.generate()
    wrap = SUITES[suite].hpke.encrypt(secret, prekey, info=LABEL + b" wrap" + _sha256(header))
    transcript = _sha256(header + wrap)
    public = ephemeral.public_key().public_bytes_raw()
    signature = device_key.sign(_signed(transcript, public, body))
    stream = ChunkStream(_request_root(transcript, secret), b"Q", request_id, attempt, handle)
    content = device_id + public + signature + body
    _, ciphertext = stream.seal(
        content, final=True, padded_bytes=padded_request_bytes(LENGTH_BYTES + len(content))
    )
    keys = DeviceAttempt(
        request_id=request_id,
        attempt=attempt,
        handle=handle,
        _transcript=transcript,
        _secret=secret,
        _ephemeral=ephemeral,
        _control=stream,
    )
    return bytes((MessageType.REQUEST,)) + header + wrap + ciphertext, keys


@dataclass(kw_only=True, slots=True)
class GatewayAttempt:
    """The gateway's keys of one attempt: opens controls, seals the answer."""

    device_id: DeviceId
    request_id: RequestId
    attempt: int
    body: bytes = field(repr=False)
    _public: bytes = field(repr=False)
    _control: ChunkStream = field(repr=False)
    _response: ChunkStream = field(repr=False)
    _last_control: int = field(default=0, repr=False)

    def seal_response(self, data: bytes, *, final: bool, at_least_bytes: int = 0) -> bytes:
        """Seal the next chunk of the answer; its number is `sealed` before the call.

        `at_least_bytes` is a plaintext size to pad to, for chunks that must all look alike.
        """
        content_bytes = max(LENGTH_BYTES + len(data), at_least_bytes)
        n, ciphertext = self._response.seal(
            data, final=final, padded_bytes=padded_chunk_bytes(content_bytes)
        )
        head = _RESPONSE.pack(
            MessageType.RESPONSE, self.request_id, self.attempt, self._public, n, final
        )
        return head + ciphertext

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
        if not _CONTROL.size < len(message) <= _CONTROL.size + MAX_CHUNK_BYTES + TAG_BYTES:
            raise SealError
        kind, request_id, attempt, n = _CONTROL.unpack_from(message)
        if (kind, request_id, attempt) != (MessageType.CONTROL, self.request_id, self.attempt):
            raise SealError
        if n <= self._last_control:
            raise SealError
        try:
            data = self._control.open(n, 0, message[_CONTROL.size :])
        except (InvalidTag, ValueError):
            raise SealError from None
        self._last_control = n
        return data


PrekeyLookup = Callable[[int, bytes], X25519PrivateKey | None]
"""(suite, prekey_id) -> the private prekey, or None when unknown, not yet valid or expired."""
DeviceLookup = Callable[[DeviceId], Ed25519PublicKey | None]
"""device_id -> its key, or None when unknown, revoked or not allowed on this topic."""


def open_request(
    message: bytes,
    *,
    handle: str,
    find_prekey: PrekeyLookup,
    find_device: DeviceLookup,
    new_key: Callable[[], X25519PrivateKey] = X25519PrivateKey.generate,
) -> GatewayAttempt:
    """Open a request that arrived on the topic of `handle` and check who signed it.

    Raises:
        SealError: anything about it is wrong. Nothing was allocated beyond the message's size.
    """
    if len(message) > MAX_MESSAGE_BYTES:
        raise SealError
    try:
        return _open_request(message, handle, find_prekey, find_device, new_key())
    except (InvalidTag, InvalidSignature, ValueError, struct.error):
        raise SealError from None


def _open_request(
    message: bytes,
    handle: str,
    find_prekey: PrekeyLookup,
    find_device: DeviceLookup,
    response_key: X25519PrivateKey,
) -> GatewayAttempt:
    kind = message[:1]
    magic, version, number, prekey_id, request_id, attempt = _HEADER.unpack_from(message, 1)
    suite = SUITES.get(number)
    if kind[0] != MessageType.REQUEST or magic != b"TG" or version != VERSION or suite is None:
        raise SealError
    prekey = find_prekey(number, prekey_id)
    wrap_end = 1 + _HEADER.size + suite.wrap_bytes
    if prekey is None or len(message) < wrap_end + REQUEST_BUCKETS[0] + TAG_BYTES:
        raise SealError
    header = message[1 : 1 + _HEADER.size]
    wrap = message[1 + _HEADER.size : wrap_end]
    secret = suite.hpke.decrypt(wrap, prekey, info=LABEL + b" wrap" + _sha256(header))
    transcript = _sha256(header + wrap)
    control = ChunkStream(_request_root(transcript, secret), b"Q", request_id, attempt, handle)
    content = control.open(0, 1, message[wrap_end:])
    if len(content) < _PREFIX_BYTES:
        raise SealError
    device_id = DeviceId(content[:16])
    ephemeral, signature, body = content[16:48], content[48:112], content[112:]
    device_key = find_device(device_id)
    if device_key is None:
        raise SealError
    device_key.verify(signature, _signed(transcript, ephemeral, body))
    public = response_key.public_key().public_bytes_raw()
    shared = response_key.exchange(X25519PublicKey.from_public_bytes(ephemeral))
    root = _response_root(transcript, public, secret, shared)
    return GatewayAttempt(
        device_id=device_id,
        request_id=RequestId(request_id),
        attempt=attempt,
        body=body,
        _public=public,
        _control=control,
        _response=ChunkStream(root, b"R", request_id, attempt, handle),
    )
