"""Signed manifests: Ed25519 (RFC 8032) over the canonical JSON, which lists every file's digest.

A signature says who made a bundle; whether that one may is the reader's list of trusted keys. Keys
are 32 bytes, written as hex in files of one line.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from tidegate.errors import BundleError, ConfigError
from tidegate.model.manifest import Manifest, Signature

_KEY_BYTES, _SIGNATURE_BYTES = 32, 64


class SigningKey:
    """The secret half of a key pair; its repr and its errors never show it."""

    def __init__(self, secret: bytes) -> None:
        """Take the 32 secret bytes."""
        self._secret = secret

    def __repr__(self) -> str:
        return "SigningKey(...)"

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key from the system's randomness."""
        return cls(os.urandom(_KEY_BYTES))

    @classmethod
    def read(cls, path: Path) -> SigningKey:
        """Read a key file; `ConfigError` names the file and not what is in it."""
        return cls(_read_hex(path, "signing key"))

    def write(self, path: Path) -> None:
        """Write the secret to a new file that only its owner can read.

        Raises:
            ConfigError: the file exists; a key is never overwritten.
        """
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise ConfigError("key file", str(path), "a new file: a key is not replaced") from error
        with os.fdopen(descriptor, "w") as file:
            file.write(self._secret.hex() + "\n")

    @property
    def public(self) -> str:
        """The public half, in hex."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        key = Ed25519PrivateKey.from_private_bytes(self._secret)
        return key.public_key().public_bytes_raw().hex()

    def sign(self, manifest: Manifest) -> Manifest:
        """The manifest with this key's signature in place of any it had."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        key = Ed25519PrivateKey.from_private_bytes(self._secret)
        value = key.sign(signed_bytes(manifest)).hex()
        return replace(manifest, signature=Signature(public_key=self.public, value=value))


def signed_bytes(manifest: Manifest) -> bytes:
    """What a signature is over: the canonical JSON with no signature in it."""
    return b"tidegate bundle v1\0" + replace(manifest, signature=None).to_bytes()


def read_public_key(path: Path) -> str:
    """The public key in a file, in hex."""
    return _read_hex(path, "public key").hex()


def check_signature(manifest: Manifest, trusted: Collection[str] | None) -> None:
    """Check the signature, and who made it.

    Args:
        manifest: as it was read.
        trusted: public keys in hex, one of which must have signed; None accepts an unsigned
            manifest and any signer, and still refuses a signature that is wrong.

    Raises:
        BundleError: the signature is wrong, missing though wanted, or by an untrusted key.
    """
    signature = manifest.signature
    if signature is None:
        if trusted is not None:
            raise BundleError("manifest.json: signature: is missing, and a trusted one is wanted")
        return
    if trusted is not None and signature.public_key not in trusted:
        raise BundleError(
            f"manifest.json: signature: made by {signature.public_key!r:.80}, which is not trusted"
        )
    if not _verifies(signature, signed_bytes(manifest)):
        raise BundleError("manifest.json: signature: is not one of this manifest")


def _verifies(signature: Signature, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key, value = bytes.fromhex(signature.public_key), bytes.fromhex(signature.value)
        if len(key) != _KEY_BYTES or len(value) != _SIGNATURE_BYTES:
            return False
        Ed25519PublicKey.from_public_bytes(key).verify(value, message)
    except (ValueError, InvalidSignature):
        return False
    return True


def _read_hex(path: Path, what: str) -> bytes:
    try:
        value = bytes.fromhex(path.read_text("ascii"))
    except OSError as error:
        raise ConfigError(what, str(path), f"a readable file ({error.strerror})") from error
    except ValueError:
        value = b""
    if len(value) != _KEY_BYTES:
        raise ConfigError(what, str(path), f"a file of {2 * _KEY_BYTES} hex digits")
    return value
