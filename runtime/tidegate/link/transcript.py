"""What the two ends derive and sign: every secret of a request, in one place.

With H the header, K the wrapped secret, E and W the fresh keys of device and gateway::

    th        SHA256(H | wrap)
    Q, C      root = HKDF-Extract(salt = th, K)            the request, and controls after it
    R         root = HKDF-Extract(salt = SHA256(th | W), K | X25519(W, E))        the answer
    device    Ed25519("tidegate/1 sig" | th | E | body_bytes u32 | SHA256(body))
    gateway   Ed25519("tidegate/1 answer" | th | W | request_id[16] | attempt u16)

The device signs the digest and the length of the body, so that a gateway knows who is speaking,
and how long for, before it has the second chunk. The gateway signs W, so that whoever stole a
prekey can read what was sealed to it but cannot answer it.
"""

from __future__ import annotations

import hashlib
import struct

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tidegate.link.chunks import LABEL

_BODY_BYTES = struct.Struct(">I")
_ATTEMPT = struct.Struct(">H")


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def wrap_info(header: bytes) -> bytes:
    """HPKE's `info`: binds the wrapped secret to the header."""
    return LABEL + b" wrap" + sha256(header)


def request_root(transcript: bytes, secret: bytes) -> bytes:
    return HKDF.extract(hashes.SHA256(), transcript, secret)


def response_root(transcript: bytes, gateway_public: bytes, secret: bytes, shared: bytes) -> bytes:
    return HKDF.extract(hashes.SHA256(), sha256(transcript + gateway_public), secret + shared)


def device_signs(transcript: bytes, ephemeral: bytes, body_bytes: int, digest: bytes) -> bytes:
    return LABEL + b" sig" + transcript + ephemeral + _BODY_BYTES.pack(body_bytes) + digest


def gateway_signs(
    transcript: bytes, gateway_public: bytes, request_id: bytes, attempt: int
) -> bytes:
    return LABEL + b" answer" + transcript + gateway_public + request_id + _ATTEMPT.pack(attempt)
