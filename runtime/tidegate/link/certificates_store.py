"""The certificate authority in a folder: `ca.pem`, `ca.key`, `fleet.facts`, and what it writes.

`ca.key` holds key and certificate of one authority or, while one takes over from another, of
several, the newest first: it signs, and what the older ones signed stays good until they are
dropped. `ca.pem` is the public half of it. `fleet.facts` is the root's statement of which
authorities the fleet has, so that no gateway can add one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tidegate.errors import IdentityError
from tidegate.link import statements
from tidegate.link.certificate_facts import read_facts, split_bundle
from tidegate.link.certificates import CertifiedKey, make_ca, revocation_list
from tidegate.link.keyfiles import (
    passphrase_from_environment,
    read_public,
    read_secret,
    write_atomic,
    write_secret,
)
from tidegate.link.registry import DeviceRegistry
from tidegate.link.wrapping import PassphraseSource

CA_CERTIFICATE = "ca.pem"
CA_KEY = "ca.key"
FACTS = "fleet.facts"
REVOKED = "revoked.pem"
BROKER_CA = "broker-ca.pem"
BROKER_CERTIFICATE = "broker-cert.pem"
BROKER_KEY = "broker-key.pem"
"""The three that a connection to the broker uses, in a device's and a gateway's folder."""

FACTS_LABEL = "fleet facts"
MOST_AUTHORITIES = 4
_CERTIFICATE = b"-----BEGIN CERTIFICATE-----\n"
_CERTIFICATE_END = b"-----END CERTIFICATE-----\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Authority:
    """A fleet's authorities, the newest first, and the root's statement about them."""

    keys: tuple[CertifiedKey, ...] = field(repr=False)
    facts: bytes = field(repr=False)

    @property
    def current(self) -> CertifiedKey:
        """The one that signs."""
        return self.keys[0]

    @property
    def bundle_pem(self) -> bytes:
        """All certificates."""
        return b"".join(key.certificate_pem for key in self.keys)


def new_authority(
    root: Ed25519PrivateKey,
    group: str,
    *,
    before: Sequence[CertifiedKey] = (),
    now_s: float | None = None,
) -> Authority:
    """Make an authority that takes over from those `before`.

    Raises:
        IdentityError: there are too many already.
    """
    if len(before) >= MOST_AUTHORITIES:
        raise IdentityError(
            f"{len(before)} certificate authorities: must be fewer than {MOST_AUTHORITIES}"
        )
    keys = (make_ca(group, now_s=now_s), *before)
    return Authority(keys=keys, facts=_facts(root, group, keys, now_s))


def without_oldest(
    authority: Authority, root: Ed25519PrivateKey, group: str, *, now_s: float | None = None
) -> Authority:
    """Drop all but the newest, once nothing that they signed is in use.

    Raises:
        IdentityError: there is only one.
    """
    if len(authority.keys) == 1:
        raise IdentityError("the fleet has one certificate authority: there is none to drop")
    keys = authority.keys[:1]
    return Authority(keys=keys, facts=_facts(root, group, keys, now_s))


def _facts(
    root: Ed25519PrivateKey, group: str, keys: Sequence[CertifiedKey], now_s: float | None
) -> bytes:
    fields = {
        "group": group,
        "authorities": [read_facts(key.certificate_pem).fingerprint for key in keys],
        "issued": int(time.time() if now_s is None else now_s),
    }
    return statements.sign(root, FACTS_LABEL, fields)


def check_facts(root: Ed25519PublicKey, facts: bytes, group: str, bundle_pem: bytes) -> None:
    """Check that the root vouches for every authority of a bundle.

    Raises:
        IdentityError: it does not, or for another group.
    """
    fields = statements.verify(root, FACTS_LABEL, facts)
    if statements.text(fields, "group") != group:
        raise IdentityError(f"fleet facts: of another group than {group!r}")
    known = statements.items(fields, "authorities", most=MOST_AUTHORITIES)
    for one in split_bundle(bundle_pem):
        if read_facts(one).fingerprint not in known:
            raise IdentityError("fleet facts: the root does not know this certificate authority")


def write_authority(folder: Path, authority: Authority, *, passphrase: bytes | None = None) -> None:
    """Keep an authority in a fleet's or an enrolling gateway's folder.

    Args:
        folder: a fleet's or a gateway's.
        authority: to keep.
        passphrase: wraps the key; None leaves it plain.

    Raises:
        IdentityError: the passphrase is too short.
    """
    secret = b"".join(key.key_pem + key.certificate_pem for key in authority.keys)
    # The root vouches for an authority before it is there, and until it is gone: a crash at any
    # point leaves a folder that works.
    path, facts = folder / FACTS, authority.facts
    if not path.exists() or _count(read_public(path)) <= _count(facts):
        write_atomic(path, facts)
    write_secret(folder / CA_KEY, secret, passphrase=passphrase)
    write_atomic(folder / CA_CERTIFICATE, authority.bundle_pem)
    write_atomic(path, facts)


def _count(facts: bytes) -> int:
    """How many authorities a statement names; it is our own file, so it is not verified."""
    fields = json.loads(facts[statements.SIGNATURE_BYTES :])
    return len(statements.items(fields, "authorities", most=MOST_AUTHORITIES))


def has_authority(folder: Path) -> bool:
    """Whether this folder can sign certificates."""
    return (folder / CA_KEY).exists()


def load_authority(
    folder: Path, *, passphrase: PassphraseSource = passphrase_from_environment
) -> Authority:
    """Read what `write_authority` wrote.

    Raises:
        IdentityError: there is none, or a file is damaged or readable by others.
    """
    if not has_authority(folder):
        raise IdentityError(f"{folder}: has no certificate authority (tidegate keys init)")
    secret = read_secret(folder / CA_KEY, passphrase=passphrase)
    keys = tuple(
        CertifiedKey(
            certificate_pem=part[part.index(_CERTIFICATE) :],
            key_pem=part[: part.index(_CERTIFICATE)],
        )
        for part in (one + _CERTIFICATE_END for one in secret.split(_CERTIFICATE_END))
        if _CERTIFICATE in part
    )
    if not keys:
        raise IdentityError(f"{folder / CA_KEY}: damaged")
    return Authority(keys=keys, facts=read_public(folder / FACTS))


def write_revocations(
    folder: Path, authority: Authority, registry: DeviceRegistry, *, now_s: float | None = None
) -> int:
    """Write `revoked.pem` for the broker, one list per authority; returns how many it revokes.

    Raises:
        CapacityError: the registry cannot be read.
    """
    serials = registry.revoked_serials(time.time() if now_s is None else now_s)
    lists = [revocation_list(key, serials, now_s=now_s) for key in authority.keys]
    write_atomic(folder / REVOKED, b"".join(lists))
    return len(serials)
