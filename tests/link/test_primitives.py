"""The primitives we build on, against published vectors: RFC 9180 and Wycheproof (C2SP)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.bindings._rust import openssl
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from tidegate.link.suites import SUITES

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "vectors"
X25519_KEM, HKDF_SHA256, CHACHA20_POLY1305, BASE = "32", "1", "3", "0"


def load(name: str) -> Any:
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"no vectors: {name} belongs into ../shared/vectors")
    return json.loads(path.read_text())


def cases(name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(group, case) for group in load(name)["testGroups"] for case in group["tests"]]


def unhex(value: str) -> bytes:
    return bytes.fromhex(value)


def test_hpke_opens_the_base_mode_messages_of_rfc_9180() -> None:
    opened = 0
    for vector in load("rfc9180.json"):
        ids = (vector["kem_id"], vector["kdf_id"], vector["aead_id"], vector["mode"])
        if tuple(map(str, ids)) != (X25519_KEM, HKDF_SHA256, CHACHA20_POLY1305, BASE):
            continue
        first = vector["encryptions"][0]
        assert int(first["seq"]) == 0
        # Our code seals with empty associated data; the vectors have some, so the test reaches
        # below the public API for it.
        plaintext = openssl.hpke._decrypt_with_aad(
            SUITES[1].hpke,
            unhex(vector["enc"]) + unhex(first["ct"]),
            X25519PrivateKey.from_private_bytes(unhex(vector["skRm"])),
            info=unhex(vector["info"]),
            aad=unhex(first["aad"]),
        )
        assert plaintext == unhex(first["pt"])
        opened += 1
    assert opened == 1


def test_x25519_agrees_with_wycheproof() -> None:
    for _, case in cases("wycheproof_x25519_test.json"):
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
    for _, case in cases("wycheproof_chacha20_poly1305_test.json"):
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
    for group, case in cases("wycheproof_ed25519_test.json"):
        key = Ed25519PublicKey.from_public_bytes(unhex(group["publicKey"]["pk"]))
        try:
            key.verify(unhex(case["sig"]), unhex(case["msg"]))
        except InvalidSignature:
            assert case["result"] == "invalid", case["tcId"]
            continue
        assert case["result"] == "valid", case["tcId"]


def test_hkdf_sha256_agrees_with_wycheproof() -> None:
    for _, case in cases("wycheproof_hkdf_sha256_test.json"):
        root = HKDF.extract(hashes.SHA256(), unhex(case["salt"]) or None, unhex(case["ikm"]))
        try:
            output = HKDFExpand(hashes.SHA256(), case["size"], unhex(case["info"])).derive(root)
        except ValueError:
            assert case["result"] == "invalid", case["tcId"]
            continue
        assert case["result"] == "valid", case["tcId"]
        assert output == unhex(case["okm"]), case["tcId"]
