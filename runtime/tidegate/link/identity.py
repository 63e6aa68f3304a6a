"""Who is who: fleet root, gateway signing keys, device keys.

The fleet root (Ed25519, kept offline) signs a gateway's key; a device pins the root. A device is
known to its gateways by a random id that only travels encrypted, and to the broker by a random
handle that is not derived from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tidegate.errors import IdentityError
from tidegate.link import statements
from tidegate.link.envelope import DeviceId
from tidegate.link.keyfiles import (
    KEY_BYTES,
    passphrase_from_environment,
    read_key,
    read_public,
)
from tidegate.link.topics import check_name
from tidegate.link.wrapping import PassphraseSource

CERTIFICATE_LABEL = "gateway certificate"
HANDLE_CHARACTERS = 32
ROOT_FILE = "root.pub"
"""The root's public key in a gateway's folder, in hexadecimal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceIdentity:
    """Everything a device needs to be itself."""

    group: str
    device_id: DeviceId
    handle: str
    key: Ed25519PrivateKey = field(repr=False)
    root: Ed25519PublicKey = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayIdentity:
    """A gateway's signing key and the root's statement about it."""

    group: str
    gateway_id: str
    key: Ed25519PrivateKey = field(repr=False)
    certificate: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayCertificate:
    """The root's statement: this key speaks for this gateway until `naf_s` (Unix time)."""

    group: str
    gateway_id: str
    key: Ed25519PublicKey
    nbf_s: int
    naf_s: int


def open_certificate(root: Ed25519PublicKey, certificate: bytes) -> GatewayCertificate:
    """Verify a gateway certificate against the pinned root.

    Raises:
        IdentityError: not signed by this root, or malformed.
    """
    fields = statements.verify(root, CERTIFICATE_LABEL, certificate)
    return GatewayCertificate(
        group=statements.text(fields, "group"),
        gateway_id=statements.text(fields, "gateway"),
        key=Ed25519PublicKey.from_public_bytes(statements.hexadecimal(fields, "key", 32)),
        nbf_s=statements.integer(fields, "nbf"),
        naf_s=statements.integer(fields, "naf"),
    )


def load_device(
    directory: Path, *, passphrase: PassphraseSource = passphrase_from_environment
) -> DeviceIdentity:
    """Load what `fleet.add_device` or `tidegate enroll` wrote.

    Raises:
        IdentityError: a file is missing, damaged or readable by others.
    """
    fields = _json(directory / "device.json")
    handle = statements.text(fields, "handle")
    return DeviceIdentity(
        group=check_name("device.json group", statements.text(fields, "group")),
        device_id=DeviceId(statements.hexadecimal(fields, "device_id", 16)),
        handle=check_name("device.json handle", handle),
        key=_signing_key(directory / "device.key", passphrase),
        root=Ed25519PublicKey.from_public_bytes(statements.hexadecimal(fields, "root", 32)),
    )


def load_gateway(
    directory: Path, *, passphrase: PassphraseSource = passphrase_from_environment
) -> GatewayIdentity:
    """Load what `fleet.add_gateway` wrote.

    Raises:
        IdentityError: a file is missing, damaged or readable by others.
    """
    fields = _json(directory / "gateway.json")
    return GatewayIdentity(
        group=check_name("gateway.json group", statements.text(fields, "group")),
        gateway_id=check_name("gateway.json gateway", statements.text(fields, "gateway")),
        key=_signing_key(directory / "gateway.key", passphrase),
        certificate=read_public(directory / "gateway.cert"),
    )


def read_root(directory: Path) -> bytes:
    """The fleet root's public key, as a gateway's folder has it.

    Raises:
        IdentityError: it is missing or damaged.
    """
    path = directory / ROOT_FILE
    try:
        root = bytes.fromhex(read_public(path).decode("ascii"))
    except ValueError:
        raise IdentityError(f"{path}: must be hexadecimal") from None
    if len(root) != KEY_BYTES:
        raise IdentityError(f"{path}: {len(root)} bytes: must be {KEY_BYTES}")
    return root


def _signing_key(path: Path, passphrase: PassphraseSource) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(read_key(path, passphrase=passphrase))


def _json(path: Path) -> Mapping[str, object]:
    try:
        fields = json.loads(read_public(path))
    except ValueError as error:
        raise IdentityError(f"{path}: must be JSON") from error
    if not isinstance(fields, dict):
        raise IdentityError(f"{path}: must be a JSON object")
    return fields
