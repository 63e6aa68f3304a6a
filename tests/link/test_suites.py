"""Suites: what they are on paper, rebuilt from the parts they are made of."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from linkdecoder import hpke_open

from tidegate.errors import ConfigError
from tidegate.link import suites
from tidegate.link.suites import (
    HYBRID,
    PREFERENCE,
    PRIVATE_BYTES,
    SUITES,
    X25519,
    HpkePrivateKey,
    PrivatePrekey,
    PublicPrekey,
    check_suites,
    works,
)

every_suite = pytest.mark.parametrize("suite", list(SUITES))
INFO = b"what for"
XWING_PUBLIC_SHA256 = "2e816deebcd76c5c80d0cd2d174478871658e8e2ff42bc9d4a6e486372e856bb"


@every_suite
def test_a_wrapped_secret_is_unwrapped_by_its_prekey_only(suite: int) -> None:
    prekey, other = PrivatePrekey.generate(suite), PrivatePrekey.generate(suite)
    wrap = prekey.public.wrap(bytes(32), INFO)
    assert len(wrap) == SUITES[suite].wrap_bytes
    assert prekey.unwrap(wrap, INFO) == bytes(32)
    for key, info in ((other, INFO), (prekey, b"")):
        with pytest.raises(InvalidTag):
            key.unwrap(wrap, info)


@every_suite
def test_a_prekey_survives_its_bytes(suite: int) -> None:
    prekey = PrivatePrekey.generate(suite)
    assert len(prekey.raw) == PRIVATE_BYTES
    assert len(prekey.public.raw) == SUITES[suite].public_bytes
    wrap = PublicPrekey.load(suite, prekey.public.raw).wrap(bytes(32), INFO)
    assert PrivatePrekey.load(suite, prekey.raw).unwrap(wrap, INFO) == bytes(32)


@every_suite
def test_a_wrap_opens_by_hpke_rebuilt_from_rfc_9180(suite: int) -> None:
    prekey = PrivatePrekey.generate(suite)
    for secret in (bytes(32), bytes(range(32))):
        wrap = prekey.public.wrap(secret, INFO)
        assert hpke_open(suite, prekey.raw, wrap, INFO) == secret


def test_a_hybrid_seed_stretches_to_the_key_of_the_drafts_first_vector() -> None:
    # draft-connolly-cfrg-xwing-kem, appendix C: the seed, and the SHA-256 of the public key.
    seed = bytes.fromhex("7f9c2ba4e88f827d616045507605853ed73b8093f6efbc88eb1a6eacfa66ef26")
    public = PrivatePrekey.load(HYBRID, seed).public.raw
    assert hashlib.sha256(public).hexdigest() == XWING_PUBLIC_SHA256


@pytest.mark.parametrize("suite", [0, 3, *SUITES])
@pytest.mark.parametrize("length", [0, 31, 33, 1215])
def test_bytes_that_are_no_key_are_refused(suite: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"suite {suite}"):
        PublicPrekey.load(suite, bytes(length))
    with pytest.raises(ValueError, match=f"suite {suite}"):
        PrivatePrekey.load(suite, bytes(length))


def test_a_lattice_key_with_coefficients_out_of_range_is_refused() -> None:
    # FIPS 203, section 7.2: the modulus check.
    with pytest.raises(ValueError, match=r".*"):
        PublicPrekey.load(HYBRID, b"\xff" * 1216)


def test_a_suite_that_this_build_lacks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(raw: bytes) -> tuple[HpkePrivateKey, bytes]:
        raise UnsupportedAlgorithm("ML-KEM-768 is not supported by this backend.")

    lacking = replace(SUITES[HYBRID], load_private=lacks)
    monkeypatch.setattr(suites, "SUITES", {X25519: SUITES[X25519], HYBRID: lacking})
    works.cache_clear()
    try:
        assert (works(X25519), works(HYBRID)) == (True, False)
        assert check_suites([X25519]) == (X25519,)
        with pytest.raises(ConfigError, match=r"without 2: .*ML-KEM"):
            check_suites(PREFERENCE)
    finally:
        works.cache_clear()


def test_the_strongest_suite_is_preferred() -> None:
    assert PREFERENCE == (HYBRID, X25519) == check_suites(PREFERENCE)
    with pytest.raises(ConfigError, match=r"1 \(X25519\)"):
        check_suites([7])
