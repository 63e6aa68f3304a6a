"""Suites: the ways to wrap a request's secret for a gateway's prekey, in one explicit registry.

A suite is an HPKE base mode (RFC 9180) and how its keys are written down. Nothing is negotiated:
a gateway's signed advert says which suites it opens, a device picks, and a prekey belongs to one
suite for good, so that no byte on the wire can talk either end into another one::

    1   DHKEM(X25519)      key 32   private 32           wrap  80    HPKE KEM 0x0020
    2   MLKEM768-X25519    key 1216 private 32 (seed)    wrap 1168   HPKE KEM 0x647a, "X-Wing"

Both with HKDF-SHA256 and ChaCha20-Poly1305. Suite 2 stays secret unless ML-KEM-768 (FIPS 203) and
X25519 are both broken; its private key is the 32-byte seed that SHAKE256 stretches to the ML-KEM
seed and the X25519 scalar (draft-connolly-cfrg-xwing-kem, section 5.2).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from tidegate.errors import ConfigError

X25519 = 1
HYBRID = 2
"""ML-KEM-768 with X25519."""
PREFERENCE = (HYBRID, X25519)
"""What a device may use, the strongest first: the default of its setting `link.suites`."""

HpkePublicKey = X25519PublicKey | hpke.MLKEM768X25519PublicKey
HpkePrivateKey = X25519PrivateKey | hpke.MLKEM768X25519PrivateKey
_MLKEM_SEED_BYTES = 64
_MLKEM_PUBLIC_BYTES = 1184
_WRAPPED_SECRET_BYTES = 32 + 16
PRIVATE_BYTES = 32
"""A private prekey of every suite, as it is stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """One way to wrap. `number` is on the wire and in signed adverts, and never reused."""

    number: int
    name: str
    hpke: hpke.Suite
    wrap_bytes: int
    public_bytes: int
    load_public: Callable[[bytes], HpkePublicKey]
    load_private: Callable[[bytes], tuple[HpkePrivateKey, bytes]]
    """From `PRIVATE_BYTES` bytes to the key, and its public half as bytes."""


def _x25519_private(raw: bytes) -> tuple[HpkePrivateKey, bytes]:
    key = X25519PrivateKey.from_private_bytes(raw)
    return key, key.public_key().public_bytes_raw()


def _hybrid_public(raw: bytes) -> HpkePublicKey:
    lattice, curve = raw[:_MLKEM_PUBLIC_BYTES], raw[_MLKEM_PUBLIC_BYTES:]
    return hpke.MLKEM768X25519PublicKey(
        MLKEM768PublicKey.from_public_bytes(lattice), X25519PublicKey.from_public_bytes(curve)
    )


def _hybrid_private(raw: bytes) -> tuple[HpkePrivateKey, bytes]:
    stretched = hashlib.shake_256(raw).digest(_MLKEM_SEED_BYTES + 32)
    lattice = MLKEM768PrivateKey.from_seed_bytes(stretched[:_MLKEM_SEED_BYTES])
    curve = X25519PrivateKey.from_private_bytes(stretched[_MLKEM_SEED_BYTES:])
    public = lattice.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()
    return hpke.MLKEM768X25519PrivateKey(lattice, curve), public


def _hpke(kem: hpke.KEM) -> hpke.Suite:
    return hpke.Suite(kem, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)


SUITES: Mapping[int, Suite] = MappingProxyType(
    {
        X25519: Suite(
            number=X25519,
            name="X25519",
            hpke=_hpke(hpke.KEM.X25519),
            wrap_bytes=32 + _WRAPPED_SECRET_BYTES,
            public_bytes=32,
            load_public=X25519PublicKey.from_public_bytes,
            load_private=_x25519_private,
        ),
        HYBRID: Suite(
            number=HYBRID,
            name="MLKEM768-X25519",
            hpke=_hpke(hpke.KEM.MLKEM768_X25519),
            wrap_bytes=1088 + 32 + _WRAPPED_SECRET_BYTES,
            public_bytes=_MLKEM_PUBLIC_BYTES + 32,
            load_public=_hybrid_public,
            load_private=_hybrid_private,
        ),
    }
)


@dataclass(frozen=True, slots=True)
class PublicPrekey:
    """The half of a prekey that devices have: it wraps secrets."""

    suite: int
    raw: bytes
    _key: HpkePublicKey = field(repr=False, compare=False)

    @classmethod
    def load(cls, suite: int, raw: bytes) -> PublicPrekey:
        """Read a public prekey.

        Raises:
            ValueError: no such suite, or these bytes are none of its keys.
        """
        known = SUITES.get(suite)
        if known is None or len(raw) != known.public_bytes:
            raise ValueError(f"no public key of suite {suite}")
        return cls(suite, raw, known.load_public(raw))

    def wrap(self, secret: bytes, info: bytes) -> bytes:
        """Encrypt `secret` (32 bytes) to the holder of the private half."""
        return SUITES[self.suite].hpke.encrypt(secret, self._key, info=info)


@dataclass(frozen=True, slots=True)
class PrivatePrekey:
    """The half of a prekey that its gateway has, `PRIVATE_BYTES` bytes in store."""

    raw: bytes = field(repr=False)
    public: PublicPrekey
    _key: HpkePrivateKey = field(repr=False, compare=False)

    @classmethod
    def load(cls, suite: int, raw: bytes) -> PrivatePrekey:
        """Read a private prekey.

        Raises:
            ValueError: no such suite, or these bytes are none of its keys.
        """
        known = SUITES.get(suite)
        if known is None or len(raw) != PRIVATE_BYTES:
            raise ValueError(f"no private key of suite {suite}")
        key, public = known.load_private(raw)
        return cls(raw, PublicPrekey.load(suite, public), key)

    @classmethod
    def generate(cls, suite: int) -> PrivatePrekey:
        """A fresh one. Every 32 bytes are a key in both suites."""
        return cls.load(suite, secrets.token_bytes(PRIVATE_BYTES))

    def unwrap(self, wrap: bytes, info: bytes) -> bytes:
        """Decrypt what `PublicPrekey.wrap` made.

        Raises:
            InvalidTag, ValueError: it was made otherwise.
        """
        return SUITES[self.public.suite].hpke.decrypt(wrap, self._key, info=info)


@cache
def works(suite: int) -> bool:
    """Whether `cryptography` can do `suite` here: one built on an old OpenSSL lacks ML-KEM."""
    try:
        SUITES[suite].load_private(bytes(PRIVATE_BYTES))
    except UnsupportedAlgorithm:
        return False
    return True


def check_suites(suites: Sequence[int]) -> tuple[int, ...]:
    """Return a usable setting of suites, preferred ones first.

    Raises:
        ConfigError: empty, with repetitions, or with a suite there is not, here or at all.
    """
    if not suites or len(set(suites)) != len(suites) or not set(suites) <= set(SUITES):
        allowed = ", ".join(f"{suite.number} ({suite.name})" for suite in SUITES.values())
        raise ConfigError("link.suites", list(suites), f"each at most once, of: {allowed}")
    for suite in suites:
        if not works(suite):
            lacking = f"without {suite}: `cryptography` was built without ML-KEM here"
            raise ConfigError("link.suites", list(suites), lacking)
    return tuple(suites)
