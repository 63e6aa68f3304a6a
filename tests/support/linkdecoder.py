"""A second reader of the link, written from docs/link-format.md alone: nothing of ours is imported.

It knows all keys of a session, decodes what was captured of it, and is as plain as can be: HKDF
by hand from HMAC (RFC 5869), HPKE base mode from RFC 9180, the hybrid KEM from its draft.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

KEM_IDS = {1: 0x0020, 2: 0x647A}
ENCAPSULATED_BYTES = {1: 32, 2: 1120}
FRAGMENT_BYTES = 65532
BUCKETS = (256, 1024, 4096, 16384, 65536)


class UndecodableError(Exception):
    """The captured bytes are not what the format says."""


def need(condition: bool, what: str) -> None:
    if not condition:
        raise UndecodableError(what)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def hkdf_extract(salt: bytes, secret: bytes) -> bytes:
    return hmac.digest(salt, secret, "sha256")


def hkdf_expand(root: bytes, info: bytes, length: int) -> bytes:
    """One block is enough for up to 32 bytes (RFC 5869, section 2.3)."""
    return hmac.digest(root, info + b"\x01", "sha256")[:length]


def x25519(private: bytes, public: bytes) -> bytes:
    key = X25519PrivateKey.from_private_bytes(private)
    return key.exchange(X25519PublicKey.from_public_bytes(public))


def x25519_public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def ed25519_public(private: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def dhkem_decapsulate(private: bytes, encapsulated: bytes) -> bytes:
    """RFC 9180, section 4.1, for X25519 with HKDF-SHA256."""
    suite = b"KEM" + struct.pack(">H", 0x0020)
    shared = x25519(private, encapsulated)
    context = encapsulated + x25519_public(private)
    root = hkdf_extract(b"", b"HPKE-v1" + suite + b"eae_prk" + shared)
    info = struct.pack(">H", 32) + b"HPKE-v1" + suite + b"shared_secret" + context
    return hkdf_expand(root, info, 32)


def xwing_decapsulate(seed: bytes, encapsulated: bytes) -> bytes:
    """draft-connolly-cfrg-xwing-kem, section 5."""
    stretched = hashlib.shake_256(seed).digest(96)
    lattice, curve = MLKEM768PrivateKey.from_seed_bytes(stretched[:64]), stretched[64:]
    lattice_part, curve_part = encapsulated[:1088], encapsulated[1088:]
    first = lattice.decapsulate(lattice_part)
    second = x25519(curve, curve_part)
    label = b"\\./" + b"/^\\"
    return hashlib.sha3_256(first + second + curve_part + x25519_public(curve) + label).digest()


def hpke_keys(kem_id: int, shared: bytes, info: bytes) -> tuple[bytes, bytes]:
    """Key and base nonce of base mode (RFC 9180, section 5.1): HKDF-SHA256, ChaCha20-Poly1305."""
    suite = b"HPKE" + struct.pack(">HHH", kem_id, 1, 3)

    def extract(salt: bytes, label: bytes, data: bytes) -> bytes:
        return hkdf_extract(salt, b"HPKE-v1" + suite + label + data)

    def expand(root: bytes, label: bytes, data: bytes, length: int) -> bytes:
        labelled = struct.pack(">H", length) + b"HPKE-v1" + suite + label + data
        return hkdf_expand(root, labelled, length)

    context = b"\0" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared, b"secret", b"")
    return expand(secret, b"key", context, 32), expand(secret, b"base_nonce", context, 12)


def hpke_open(suite: int, private: bytes, wrap: bytes, info: bytes) -> bytes:
    """What was encrypted first, with no associated data."""
    split = ENCAPSULATED_BYTES[suite]
    decapsulate = dhkem_decapsulate if suite == 1 else xwing_decapsulate
    key, nonce = hpke_keys(KEM_IDS[suite], decapsulate(private, wrap[:split]), info)
    return ChaCha20Poly1305(key).decrypt(nonce, wrap[split:], b"")


@dataclass(kw_only=True)
class Session:
    """One attempt as somebody sees it who has captured all messages and holds every key."""

    prekey_private: bytes
    response_private: bytes
    device_public: bytes
    gateway_public: bytes
    handle: str
    device_id: bytes = b""
    body: bytes = b""
    request_id: bytes = b""
    attempt: int = 0
    controls: list[bytes] = field(default_factory=list)
    answer: list[tuple[int, bool, bytes]] = field(default_factory=list)
    _transcript: bytes = b""
    _secret: bytes = b""
    _ephemeral: bytes = b""

    def request(self, messages: list[bytes]) -> None:
        """All messages of the request, in order."""
        first = messages[0]
        magic, version, suite, _, self.request_id, self.attempt = struct.unpack(
            ">2sBB8s16sH", first[1:31]
        )
        need((first[0], magic, version) == (1, b"TG", 1), "head")
        split = 31 + ENCAPSULATED_BYTES[suite] + 48
        header, wrap, flags = first[1:31], first[31:split], first[split]
        self._secret = hpke_open(
            suite, self.prekey_private, wrap, b"tidegate/1 wrap" + sha256(header)
        )
        self._transcript = sha256(header + wrap)
        root = hkdf_extract(self._transcript, self._secret)
        data, padded = self._chunk(root, b"Q", 0, flags, first[split + 1 :])
        for n, message in enumerate(messages[1:], 1):
            need(flags == 0 and padded == 65536, "every chunk but the last is full")
            expected = struct.pack(">B16sHQ", 4, self.request_id, self.attempt, n)
            need(message[:27] == expected, "head of a part")
            flags = message[27]
            more, padded = self._chunk(root, b"Q", n, flags, message[28:])
            data += more
        need(flags == 1, "the last chunk ends the stream")
        bucket = min((size for size in BUCKETS if size >= 4 + len(data)), default=65536)
        need(padded == bucket, "bucket")
        need(len(messages) == -(-len(data) // FRAGMENT_BYTES), "as few chunks as can be")
        self._read_opening(data)

    def _read_opening(self, data: bytes) -> None:
        self.device_id, self._ephemeral, length, digest, signature = struct.unpack(
            ">16s32sI32s64s", data[:148]
        )
        self.body = data[148:]
        need((length, digest) == (len(self.body), sha256(self.body)), "digest")
        signed = self._transcript + self._ephemeral + struct.pack(">I", length) + digest
        key = Ed25519PublicKey.from_public_bytes(self.device_public)
        key.verify(signature, b"tidegate/1 sig" + signed)

    def control(self, message: bytes) -> None:
        kind, request_id, attempt, n = struct.unpack(">B16sHQ", message[:27])
        need((kind, request_id, attempt) == (3, self.request_id, self.attempt), "control")
        root = hkdf_extract(self._transcript, self._secret)
        data, padded = self._chunk(root, b"C", n, 0, message[27:])
        need(n == len(self.controls) and padded % 64 == 0, "controls count from 0")
        self.controls.append(data)

    def response(self, message: bytes) -> None:
        kind, request_id, attempt, n, flags = struct.unpack(">B16sHQB", message[:28])
        need((kind, request_id, attempt) == (2, self.request_id, self.attempt), "response")
        need(flags < 4, "flags")
        public, start = x25519_public(self.response_private), 28
        if flags & 2:
            start = 124
            need(message[28:60] == public, "W")
            signed = self._transcript + public + self.request_id + struct.pack(">H", self.attempt)
            key = Ed25519PublicKey.from_public_bytes(self.gateway_public)
            key.verify(message[60:124], b"tidegate/1 answer" + signed)
        shared = x25519(self.response_private, self._ephemeral)
        root = hkdf_extract(sha256(self._transcript + public), self._secret + shared)
        data, padded = self._chunk(root, b"R", n, flags, message[start:])
        need(padded % 64 == 0, "padding")
        self.answer.append((n, bool(flags & 1), data))

    def _chunk(
        self, root: bytes, direction: bytes, n: int, flags: int, ciphertext: bytes
    ) -> tuple[bytes, int]:
        """The data of a chunk, and how long it was with its padding."""
        where = direction + self.request_id
        key = hkdf_expand(root, b"tidegate/1 key" + where, 32)
        iv = hkdf_expand(root, b"tidegate/1 iv" + where, 12)
        nonce = bytes(a ^ b for a, b in zip(iv, struct.pack(">4xQ", n), strict=True))
        place = where + struct.pack(">H", self.attempt) + self.handle.encode("ascii")
        associated = b"tidegate/1" + place + struct.pack(">QB", n, flags)
        plain = ChaCha20Poly1305(key).decrypt(nonce, ciphertext, associated)
        (length,) = struct.unpack(">I", plain[:4])
        need(length <= len(plain) - 4 and not plain[4 + length :].strip(b"\0"), "zeros")
        return plain[4 : 4 + length], len(plain)
