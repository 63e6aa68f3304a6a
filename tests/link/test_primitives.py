"""The primitives we build on, against published vectors: RFC 9180 and Wycheproof (C2SP)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.bindings._rust import openssl
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from linkdecoder import dhkem_decapsulate, hpke_keys

from tidegate.link.suites import SUITES, X25519

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "vectors"
X25519_KEM = 0x20
KEMS = {0x10: hpke.KEM.P256, 0x12: hpke.KEM.P521, X25519_KEM: hpke.KEM.X25519}
CURVES = {0x10: ec.SECP256R1(), 0x12: ec.SECP521R1()}
KDFS = {1: hpke.KDF.HKDF_SHA256, 3: hpke.KDF.HKDF_SHA512}
AEADS = {1: hpke.AEAD.AES_128_GCM, 2: hpke.AEAD.AES_256_GCM, 3: hpke.AEAD.CHACHA20_POLY1305}
OURS = (X25519_KEM, 1, 3)
"""Suite 1 of the link."""
RFC_MESSAGES = 6


def load(name: str) -> Any:
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"no vectors: {name} belongs into ../shared/vectors")
    return json.loads(path.read_text())


def cases(name: str, *, count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every case with its group; `count` is how many the file must have."""
    found = [(group, case) for group in load(name)["testGroups"] for case in group["tests"]]
    assert len(found) == count == len({case["tcId"] for _, case in found})
    return found


def unhex(value: str) -> bytes:
    return bytes.fromhex(value)


def base_mode() -> list[dict[str, Any]]:
    """The vectors that the library can do: base mode with an AEAD, which are 6 of 28."""
    vectors = load("rfc9180.json")
    assert len(vectors) == 28
    return [one for one in vectors if int(one["mode"]) == 0 and int(one["aead_id"]) in AEADS]


def private_key(kem_id: int, raw: bytes) -> Any:
    if kem_id == X25519_KEM:
        return X25519PrivateKey.from_private_bytes(raw)
    return ec.derive_private_key(int.from_bytes(raw, "big"), CURVES[kem_id])


def test_hpke_opens_the_base_mode_messages_of_rfc_9180() -> None:
    opened = []
    for vector in base_mode():
        kem_id, kdf_id, aead_id = (int(vector[name]) for name in ("kem_id", "kdf_id", "aead_id"))
        first = vector["encryptions"][0]
        assert int(first["seq"]) == 0
        # Our code seals with empty associated data; the vectors have some, so the test reaches
        # below the public API for it.
        ours = (kem_id, kdf_id, aead_id) == OURS
        suite = hpke.Suite(KEMS[kem_id], KDFS[kdf_id], AEADS[aead_id])
        plaintext = openssl.hpke._decrypt_with_aad(
            SUITES[X25519].hpke if ours else suite,
            unhex(vector["enc"]) + unhex(first["ct"]),
            private_key(kem_id, unhex(vector["skRm"])),
            info=unhex(vector["info"]),
            aad=unhex(first["aad"]),
        )
        assert plaintext == unhex(first["pt"])
        opened.append((kem_id, kdf_id, aead_id))
    assert len(opened) == 6
    assert OURS in opened


def test_the_second_decoders_hpke_agrees_with_rfc_9180_message_by_message() -> None:
    (vector,) = [
        one
        for one in base_mode()
        if (int(one["kem_id"]), int(one["kdf_id"]), int(one["aead_id"])) == OURS
    ]
    shared = dhkem_decapsulate(unhex(vector["skRm"]), unhex(vector["enc"]))
    assert shared == unhex(vector["shared_secret"])
    key, base_nonce = hpke_keys(X25519_KEM, shared, unhex(vector["info"]))
    assert (key, base_nonce) == (unhex(vector["key"]), unhex(vector["base_nonce"]))
    for one in vector["encryptions"]:
        number = int.from_bytes(base_nonce, "big") ^ int(one["seq"])
        plaintext = ChaCha20Poly1305(key).decrypt(
            number.to_bytes(12, "big"), unhex(one["ct"]), unhex(one["aad"])
        )
        assert plaintext == unhex(one["pt"])
    assert len(vector["encryptions"]) == RFC_MESSAGES


def test_ml_kem_768_agrees_with_wycheproof() -> None:
    agreed = 0
    for _, case in cases("wycheproof_mlkem_768_test.json", count=193):
        try:
            key = MLKEM768PrivateKey.from_seed_bytes(unhex(case["seed"]))
            secret = key.decapsulate(unhex(case["c"]))
        except ValueError:
            assert case["result"] == "invalid", case["tcId"]
            continue
        assert case["result"] == "valid", case["tcId"]
        assert secret == unhex(case["K"]), case["tcId"]
        assert key.public_key().public_bytes_raw() == unhex(case["ek"]), case["tcId"]
        agreed += 1
    assert agreed == 153


def test_x25519_agrees_with_wycheproof() -> None:
    for _, case in cases("wycheproof_x25519_test.json", count=518):
        private = X25519PrivateKey.from_private_bytes(unhex(case["private"]))
        public = X25519PublicKey.from_public_bytes(unhex(case["public"]))
        try:
            shared = private.exchange(public)
        except ValueError:
            # A low-order point: refusing it is what we want ("acceptable" in the vectors).
            assert case["result"] != "valid", case["tcId"]
            continue
        assert case["result"] != "invalid", case["tcId"]
        assert shared == unhex(case["shared"]), case["tcId"]


def test_chacha20_poly1305_agrees_with_wycheproof() -> None:
    for _, case in cases("wycheproof_chacha20_poly1305_test.json", count=325):
        sealed = unhex(case["ct"]) + unhex(case["tag"])
        try:
            key = ChaCha20Poly1305(unhex(case["key"]))
            plaintext = key.decrypt(unhex(case["iv"]), sealed, unhex(case["aad"]))
        except (InvalidTag, ValueError):
            assert case["result"] == "invalid", case["tcId"]
            continue
        assert case["result"] == "valid", case["tcId"]
        assert plaintext == unhex(case["msg"]), case["tcId"]


def test_ed25519_agrees_with_wycheproof() -> None:
    for group, case in cases("wycheproof_ed25519_test.json", count=151):
        key = Ed25519PublicKey.from_public_bytes(unhex(group["publicKey"]["pk"]))
        try:
            key.verify(unhex(case["sig"]), unhex(case["msg"]))
        except InvalidSignature:
            assert case["result"] == "invalid", case["tcId"]
            continue
        assert case["result"] == "valid", case["tcId"]


def test_hkdf_sha256_agrees_with_wycheproof() -> None:
    for _, case in cases("wycheproof_hkdf_sha256_test.json", count=86):
        root = HKDF.extract(hashes.SHA256(), unhex(case["salt"]) or None, unhex(case["ikm"]))
        try:
            output = HKDFExpand(hashes.SHA256(), case["size"], unhex(case["info"])).derive(root)
        except ValueError:
            assert case["result"] == "invalid", case["tcId"]
            continue
        assert case["result"] == "valid", case["tcId"]
        assert output == unhex(case["okm"]), case["tcId"]
