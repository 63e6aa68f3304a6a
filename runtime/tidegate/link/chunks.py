"""A stream of sealed chunks: one direction of one attempt, under one key.

STREAM (Hoang, Reyhanitabar, Rogaway, Vizar: eprint 2015/189) with an explicit chunk number: the
nonce counts, and the associated data holds everything that says where a chunk belongs, so it
opens in one place only::

    key, iv   HKDF-Expand(root, "tidegate/1 key" | dir | request_id) and "... iv"        RFC 5869
    chunk n   ChaCha20-Poly1305(key, iv xor n, len u32 | data | zeros,                   RFC 8439
              aad = "tidegate/1" | dir | request_id | attempt | topic handle | n u64 | FINAL u8)
"""

from __future__ import annotations

import struct

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

LABEL = b"tidegate/1"
"""Starts every label and all associated data of version 1."""
LENGTH_BYTES = 4
TAG_BYTES = 16
CHUNK_MULTIPLE = 64
"""Answer and control chunks are padded to multiples of this many bytes."""
REQUEST_BUCKETS = (256, 1024, 4096, 16384, 65536)
"""A request is padded to one of these, beyond them to multiples of the last."""


def padded_request_bytes(content_bytes: int) -> int:
    """Bucket that a request plaintext of `content_bytes` is padded to."""
    for bucket in REQUEST_BUCKETS:
        if content_bytes <= bucket:
            return bucket
    return -(-content_bytes // REQUEST_BUCKETS[-1]) * REQUEST_BUCKETS[-1]


def padded_chunk_bytes(content_bytes: int) -> int:
    """`content_bytes` rounded up to the next multiple of `CHUNK_MULTIPLE`."""
    return -(-content_bytes // CHUNK_MULTIPLE) * CHUNK_MULTIPLE


class ChunkStream:
    """One direction of one attempt: seals in order, opens in any order, each chunk in its place."""

    def __init__(
        self, root: bytes, direction: bytes, request_id: bytes, attempt: int, handle: str
    ) -> None:
        context = direction + request_id
        self._aead = ChaCha20Poly1305(_expand(root, b" key" + context, 32))
        self._iv = int.from_bytes(_expand(root, b" iv" + context, 12), "big")
        self._aad = LABEL + context + attempt.to_bytes(2, "big") + handle.encode("ascii")
        self.next_n = 0

    def seal(self, data: bytes, *, final: bool, padded_bytes: int) -> tuple[int, bytes]:
        """Seal the next chunk; returns its number and its ciphertext."""
        n = self.next_n
        self.next_n = n + 1
        plaintext = (len(data).to_bytes(LENGTH_BYTES, "big") + data).ljust(padded_bytes, b"\0")
        return n, self._aead.encrypt(self._nonce(n), plaintext, self._place(n, final))

    def open(self, n: int, final: int, ciphertext: bytes) -> bytes:
        """Open chunk `n`.

        Raises:
            InvalidTag, ValueError: anything about it is wrong.
        """
        plaintext = self._aead.decrypt(self._nonce(n), ciphertext, self._place(n, final))
        end = LENGTH_BYTES + int.from_bytes(plaintext[:LENGTH_BYTES], "big")
        if len(plaintext) < LENGTH_BYTES or end > len(plaintext) or any(plaintext[end:]):
            raise ValueError("padding")
        return plaintext[LENGTH_BYTES:end]

    def _nonce(self, n: int) -> bytes:
        return (self._iv ^ n).to_bytes(12, "big")

    def _place(self, n: int, final: int) -> bytes:
        return self._aad + struct.pack(">QB", n, final)


def _expand(root: bytes, info: bytes, length_bytes: int) -> bytes:
    return HKDFExpand(hashes.SHA256(), length_bytes, LABEL + info).derive(root)
