"""A stream of sealed chunks: one direction of one attempt, under one key.

STREAM (Hoang, Reyhanitabar, Rogaway, Vizar: eprint 2015/189) with an explicit chunk number: the
nonce counts, and the associated data holds everything that says where a chunk belongs, so it
opens in one place only::

    key, iv   HKDF-Expand(root, "tidegate/1 key" | dir | request_id) and "... iv"        RFC 5869
    chunk n   ChaCha20-Poly1305(key, iv xor n, len u32 | data | zeros,                   RFC 8439
              aad = "tidegate/1" | dir | request_id | attempt | topic handle | n u64 | flags u8)

A chunk of no data is legal: it is a filler, for an end that must not be silent.
"""

from __future__ import annotations

import struct

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

LABEL = b"tidegate/1"
"""Starts every label and all associated data of version 1."""
_pack_place = struct.Struct(">QB").pack
NONCE_BYTES = 12
_pack_length, _unpack_length = struct.Struct(">I").pack, struct.Struct(">I").unpack_from
LENGTH_BYTES = 4
TAG_BYTES = 16
CHUNK_MULTIPLE = 64
"""Answer and control chunks are padded to multiples of this many bytes."""
REQUEST_BUCKETS = (256, 1024, 4096, 16384, 65536)
"""A request is padded to one of these; one that is longer becomes several chunks of the last."""
FINAL = 1
"""Flag: the stream ends with this chunk."""
SIGNED = 2
"""Flag, in answers: this chunk carries the gateway's key W and its signature in clear."""


def padded_request_bytes(data_bytes: int) -> int:
    """Plaintext bytes of a request's only chunk with `data_bytes` of data: one of the buckets.

    Raises:
        ValueError: it needs several chunks.
    """
    for bucket in REQUEST_BUCKETS:
        if LENGTH_BYTES + data_bytes <= bucket:
            return bucket
    raise ValueError(f"{data_bytes} bytes: a chunk holds {REQUEST_BUCKETS[-1] - LENGTH_BYTES}")


def padded_chunk_bytes(data_bytes: int, at_least: int = 0) -> int:
    """Plaintext bytes of an answer or control chunk with `data_bytes` of data.

    A multiple of `CHUNK_MULTIPLE`; `at_least` makes chunks of a constant rate alike.
    """
    return -(-max(LENGTH_BYTES + data_bytes, at_least) // CHUNK_MULTIPLE) * CHUNK_MULTIPLE


class ChunkStream:
    """One direction of one attempt: seals in order, opens in any order, each chunk in its place."""

    def __init__(
        self, root: bytes, direction: bytes, request_id: bytes, attempt: int, handle: str
    ) -> None:
        context = direction + request_id
        self._aead = ChaCha20Poly1305(_expand(root, b" key" + context, 32))
        self._iv = int.from_bytes(_expand(root, b" iv" + context, NONCE_BYTES), "big")
        self._aad = LABEL + context + attempt.to_bytes(2, "big") + handle.encode("ascii")
        self.next_n = 0

    def seal(self, data: bytes, *, flags: int, padded_bytes: int) -> tuple[int, bytes]:
        """Seal the next chunk; returns its number and its ciphertext.

        `padded_bytes` is the plaintext's length: at least `LENGTH_BYTES` more than `data`.
        """
        assert LENGTH_BYTES + len(data) <= padded_bytes, "padding never cuts"
        n = self.next_n
        self.next_n = n + 1
        plaintext = (_pack_length(len(data)) + data).ljust(padded_bytes, b"\0")
        # Spelled out here and in `open`: every microsecond counts some thousand times a second.
        nonce = (self._iv ^ n).to_bytes(NONCE_BYTES, "big")
        return n, self._aead.encrypt(nonce, plaintext, self._aad + _pack_place(n, flags))

    def open(self, n: int, flags: int, ciphertext: bytes) -> bytes:
        """Open chunk `n`.

        Raises:
            InvalidTag, ValueError: anything about it is wrong.
        """
        nonce = (self._iv ^ n).to_bytes(NONCE_BYTES, "big")
        plaintext = self._aead.decrypt(nonce, ciphertext, self._aad + _pack_place(n, flags))
        if len(plaintext) < LENGTH_BYTES:
            raise ValueError("padding")
        end = LENGTH_BYTES + _unpack_length(plaintext)[0]
        if end + plaintext.count(0, end) != len(plaintext):
            raise ValueError("padding")
        return plaintext[LENGTH_BYTES:end]


def _expand(root: bytes, info: bytes, length_bytes: int) -> bytes:
    return HKDFExpand(hashes.SHA256(), length_bytes, LABEL + info).derive(root)
