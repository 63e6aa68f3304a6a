"""What `tidegate keys show` says of a folder: roles, names, fingerprints, validity, no secret.

No wrapped key is read, so it needs no passphrase.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.errors import IdentityError

if TYPE_CHECKING:
    from tidegate.link.gateway_revocation import Revocations


def describe(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and value of every line.

    Raises:
        IdentityError: the folder holds no keys, or a file is damaged.
    """
    for marker, describer in (
        ("fleet.json", _fleet),
        ("gateway.json", _gateway),
        ("device.json", _device),
    ):
        if (folder / marker).exists():
            yield from describer(folder)
            return
    raise IdentityError(f"{folder}: holds neither a fleet nor a gateway nor a device")


def _fleet(folder: Path) -> Iterator[tuple[str, str]]:
    fields = _json(folder / "fleet.json")
    yield "role", "fleet root; keep it offline"
    yield "group", fields["group"]
    yield "root", _fingerprint(fields["root"])
    yield from _keys(folder, "root.key", "ca.key")
    yield from _certificates(folder / "ca.pem", "authority")


def _gateway(folder: Path) -> Iterator[tuple[str, str]]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from tidegate.link.clock import utc
    from tidegate.link.enrolment_device import fingerprint
    from tidegate.link.gateway_revocation import read_revocations
    from tidegate.link.identity import open_certificate, read_root
    from tidegate.link.keyfiles import read_public

    fields = _json(folder / "gateway.json")
    yield "role", "gateway" + (", enrols devices" if (folder / "ca.key").exists() else "")
    yield "group", fields["group"]
    yield "name", fields["gateway"]
    if (folder / "root.pub").exists():
        root = read_root(folder)
        public = Ed25519PublicKey.from_public_bytes(root)
        certificate = open_certificate(public, read_public(folder / "gateway.cert"))
        yield "root", fingerprint(root)
        yield "signing key", fingerprint(certificate.key.public_bytes_raw())
        yield "signing key valid", f"{utc(certificate.nbf_s)} to {utc(certificate.naf_s)}"
        known = read_revocations(folder, public, fields["group"])
        if known.revokes(certificate.gateway_id, certificate.nbf_s):
            yield "signing key refused", "this gateway's key is revoked (keys rotate gateway)"
        yield from _revoked(known)
    yield from _keys(folder, "gateway.key", "ca.key")
    yield from _certificates(folder / "ca.pem", "authority")
    yield from _certificates(folder / "broker-cert.pem", "broker certificate")
    yield from _prekeys(folder)
    yield from _devices(folder)


def _prekeys(folder: Path) -> Iterator[tuple[str, str]]:
    """Every prekey that the gateway holds; nothing of their private halves is shown."""
    from tidegate.link.clock import utc
    from tidegate.link.prekeys import held_prekeys
    from tidegate.link.suites import SUITES

    now_s = time.time()
    for one in held_prekeys(folder / "prekeys.json"):
        suite = f"suite {one.suite} ({SUITES[one.suite].name})"
        erased = "is erased then" if now_s < one.naf_s else "is erased when the gateway runs"
        period = f"valid {utc(one.nbf_s)} to {utc(one.naf_s)}"
        yield "prekey", f"{one.prekey_id.hex()}, {suite}, {period}, {erased}"


def _devices(folder: Path) -> Iterator[tuple[str, str]]:
    from tidegate.link.registry import DeviceRegistry

    path = folder / "devices.sqlite"
    if not path.exists():
        yield "devices", "0"
        return
    with closing(DeviceRegistry(path)) as registry:
        refused = [one.refusal(time.time()) is not None for one in registry.devices()]
    yield "devices", f"{len(refused)}, {sum(refused)} of them revoked or expired"


def _device(folder: Path) -> Iterator[tuple[str, str]]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from tidegate.link.gateway_revocation import read_revocations

    fields = _json(folder / "device.json")
    yield "role", "device"
    yield "group", fields["group"]
    yield "handle", fields["handle"]
    yield "root", _fingerprint(fields["root"])
    yield from _keys(folder, "device.key", "device.next.key")
    if (folder / "device.next.key").exists():
        yield "key rotation", "under way: the daemon tells every gateway that it hears"
    root = Ed25519PublicKey.from_public_bytes(bytes.fromhex(fields["root"]))
    yield from _revoked(read_revocations(folder, root, fields["group"]))
    yield from _certificates(folder / "broker-cert.pem", "broker certificate")


def _revoked(known: Revocations) -> Iterator[tuple[str, str]]:
    from tidegate.link.clock import utc

    for gateway_id, until_s in sorted(known.until_s.items()):
        yield "revoked gateways", f"{gateway_id}, keys certified up to {utc(until_s)}"


def _keys(folder: Path, *names: str) -> Iterator[tuple[str, str]]:
    from tidegate.link.keyfiles import read_public
    from tidegate.link.wrapping import is_plain, is_wrapped

    for name in names:
        path = folder / name
        if not path.exists():
            continue
        data = read_public(path)
        form = "plain" if is_plain(data) else "wrapped" if is_wrapped(data) else "by a command"
        mode = path.stat().st_mode & 0o777
        yield name, form + (f", mode {mode:04o}: must be 0600" if mode & 0o077 else "")


def _certificates(path: Path, name: str) -> Iterator[tuple[str, str]]:
    from tidegate.link.certificate_facts import read_facts, split_bundle
    from tidegate.link.clock import utc
    from tidegate.link.keyfiles import read_public

    if not path.exists():
        return
    for pem in split_bundle(read_public(path)):
        facts = read_facts(pem)
        yield name, f"{facts.common_name}, sha256 {facts.fingerprint[:32]}"
        yield f"{name} valid", f"{utc(facts.nbf_s)} to {utc(facts.naf_s)}"


def _fingerprint(root: str) -> str:
    from tidegate.link.enrolment_device import fingerprint

    try:
        return fingerprint(bytes.fromhex(root))
    except ValueError:
        raise IdentityError("root: must be hexadecimal") from None


def _json(path: Path) -> dict[str, str]:
    """The text fields of one of our JSON files."""
    from tidegate.link.keyfiles import read_public

    try:
        fields = json.loads(read_public(path))
        return {name: value for name, value in fields.items() if isinstance(value, str)}
    except (ValueError, AttributeError):
        raise IdentityError(f"{path}: must be a JSON object") from None
