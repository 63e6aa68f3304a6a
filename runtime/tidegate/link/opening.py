"""Opening requests at the gateway: one message or several, checked before anything is kept.

The first chunk says who speaks and how long the body is, and both are signed: a sender that is
not a registered device on its own topic costs nothing but the decryption of its message. The
other chunks may come in any order and more than once; the body is whole when all are there and
its digest is the signed one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from tidegate.errors import SealError
from tidegate.link.chunks import FINAL, ChunkStream
from tidegate.link.envelope import (
    UNREADABLE,
    DeviceId,
    GatewayAttempt,
    MessageType,
    RequestId,
    read_head,
)
from tidegate.link.suites import SUITES, PrivatePrekey
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
    FRAGMENT_BYTES,
    HEADER,
    MAGIC,
    MAX_BODY_BYTES,
    MAX_MESSAGE_BYTES,
    OPENING,
    VERSION,
    WHO_ANSWERS,
    fragments,
)

PrekeyLookup = Callable[[int, bytes], PrivatePrekey | None]
"""(suite, prekey_id) -> the private prekey, or None when unknown, not yet valid or expired."""
DeviceLookup = Callable[[DeviceId], Sequence[Ed25519PublicKey]]
"""device_id -> its keys, two while one replaces the other; none when unknown or on a topic that is
not its own."""


@dataclass(kw_only=True, slots=True)
class PartialRequest:
    """A request whose first chunk opened. Holds `body_bytes` at most, and a little."""

    device_id: DeviceId
    request_id: RequestId
    attempt: int
    body_bytes: int
    _handle: str = field(repr=False)
    _digest: bytes = field(repr=False)
    _ephemeral: bytes = field(repr=False)
    _transcript: bytes = field(repr=False)
    _secret: bytes = field(repr=False)
    _stream: ChunkStream = field(repr=False)
    _pieces: dict[int, bytes] = field(repr=False)

    @property
    def complete(self) -> bool:
        """All chunks are there."""
        return len(self._pieces) == fragments(OPENING.size + self.body_bytes)

    def take(self, message: bytes) -> None:
        """Open one more chunk; one that is known already changes nothing.

        Raises:
            SealError: anything about it is wrong. What was there before stays.
        """
        try:
            own = (MessageType.PART, self.request_id, self.attempt)
            n, flags = read_head(message, CHUNK_HEAD, own)
            if n == 0:
                raise SealError
            data = self._stream.open(n, flags, message[CHUNK_HEAD.size :])
            self._check_piece(n, flags, len(data))
        except UNREADABLE:
            raise SealError from None
        self._pieces[n] = data

    def _check_piece(self, n: int, flags: int, data_bytes: int) -> None:
        """Chunk `n` is as long as it must be, and says rightly whether it is the last.

        Raises:
            SealError: it is not.
        """
        content_bytes = OPENING.size + self.body_bytes
        left_bytes = content_bytes - n * FRAGMENT_BYTES
        last = n == fragments(content_bytes) - 1
        if flags != (FINAL if last else 0) or data_bytes != min(left_bytes, FRAGMENT_BYTES):
            raise SealError

    def finish(
        self,
        gateway_key: Ed25519PrivateKey,
        new_key: Callable[[], X25519PrivateKey] = X25519PrivateKey.generate,
    ) -> GatewayAttempt:
        """The whole request, and the keys to answer it with.

        Args:
            gateway_key: the one that signs adverts; it signs who answers.
            new_key: makes W.

        Raises:
            SealError: chunks are missing, or the body is not the one that was signed.
        """
        if not self.complete:
            raise SealError
        content = b"".join(self._pieces[n] for n in range(len(self._pieces)))
        body = content[OPENING.size :]
        if sha256(body) != self._digest:
            raise SealError
        key = new_key()
        try:
            shared = key.exchange(X25519PublicKey.from_public_bytes(self._ephemeral))
        except ValueError:
            raise SealError from None
        public = key.public_key().public_bytes_raw()
        signed = gateway_signs(self._transcript, public, self.request_id, self.attempt)
        root = response_root(self._transcript, public, self._secret, shared)
        request = request_root(self._transcript, self._secret)
        place = (self.request_id, self.attempt, self._handle)
        return GatewayAttempt(
            device_id=self.device_id,
            request_id=self.request_id,
            attempt=self.attempt,
            body=body,
            _who_answers=WHO_ANSWERS.pack(public, gateway_key.sign(signed)),
            _control=ChunkStream(request, b"C", *place),
            _response=ChunkStream(root, b"R", *place),
        )


def open_first(
    message: bytes, *, handle: str, find_prekey: PrekeyLookup, find_device: DeviceLookup
) -> PartialRequest:
    """Open a REQUEST message that arrived on the topic of `handle`, and check who signed it.

    Raises:
        SealError: anything about it is wrong.
    """
    if len(message) > MAX_MESSAGE_BYTES:
        raise SealError
    try:
        return _open_first(message, handle, find_prekey, find_device)
    except UNREADABLE:
        raise SealError from None


def _signed(key: Ed25519PublicKey, signature: bytes, data: bytes) -> bool:
    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _open_first(
    message: bytes, handle: str, find_prekey: PrekeyLookup, find_device: DeviceLookup
) -> PartialRequest:
    magic, version, number, prekey_id, request_id, attempt = HEADER.unpack_from(message, 1)
    suite = SUITES.get(number)
    if message[0] != MessageType.REQUEST or magic != MAGIC or version != VERSION or suite is None:
        raise SealError
    prekey = find_prekey(number, prekey_id)
    wrap_start = 1 + HEADER.size
    wrap_end = wrap_start + suite.wrap_bytes
    if prekey is None or prekey.public.suite != number or len(message) <= wrap_end:
        raise SealError
    header, wrap, flags = message[1:wrap_start], message[wrap_start:wrap_end], message[wrap_end]
    secret = prekey.unwrap(wrap, wrap_info(header))
    transcript = sha256(header + wrap)
    root = request_root(transcript, secret)
    stream = ChunkStream(root, b"Q", request_id, attempt, handle)
    content = stream.open(0, flags, message[wrap_end + 1 :])
    device_id, ephemeral, body_bytes, digest, signature = OPENING.unpack_from(content)
    signed = device_signs(transcript, ephemeral, body_bytes, digest)
    known = find_device(DeviceId(device_id))
    if body_bytes > MAX_BODY_BYTES or not any(_signed(key, signature, signed) for key in known):
        raise SealError
    partial = PartialRequest(
        device_id=DeviceId(device_id),
        request_id=RequestId(request_id),
        attempt=attempt,
        body_bytes=body_bytes,
        _handle=handle,
        _digest=digest,
        _ephemeral=ephemeral,
        _transcript=transcript,
        _secret=secret,
        _stream=stream,
        _pieces={0: content},
    )
    partial._check_piece(0, flags, len(content))
    return partial
