"""Making a fleet: a root, gateways certified by it, devices registered at them.

Directories: a fleet has `root.key` (keep it offline), `fleet.json` and the certificate authority
of `certificates_store`; a gateway `gateway.key`, `gateway.cert`, `gateway.json`, `root.pub`,
`devices.sqlite` and, if it enrols devices, the authority; a device `device.key`, `device.json` and,
if it enrolled, its broker certificate.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tidegate.errors import IdentityError
from tidegate.link import statements
from tidegate.link.certificates import issue_gateway
from tidegate.link.certificates_store import (
    BROKER_CA,
    BROKER_CERTIFICATE,
    BROKER_KEY,
    load_authority,
    new_authority,
    write_authority,
)
from tidegate.link.envelope import DeviceId
from tidegate.link.gateway_revocation import (
    REVOKED_FILE,
    Revocations,
    read_revocations,
    seal_revocations,
)
from tidegate.link.identity import (
    CERTIFICATE_LABEL,
    HANDLE_CHARACTERS,
    ROOT_FILE,
    DeviceIdentity,
    GatewayIdentity,
    load_device,
    load_gateway,
)
from tidegate.link.keyfiles import (
    passphrase_from_environment,
    read_key,
    read_public,
    write_atomic,
    write_secret,
)
from tidegate.link.registry import DeviceRecord, DeviceRegistry
from tidegate.link.topics import check_name
from tidegate.link.wrapping import PassphraseSource

CERTIFICATE_VALID_S = 365 * 24 * 3600
CERTIFIED_FILE = "gateways.certified"
"""In the fleet's folder: when the root last certified a key of each gateway."""


def create_fleet(
    fleet_dir: Path,
    *,
    group: str = "home",
    now_s: float | None = None,
    passphrase: bytes | None = None,
) -> None:
    """Make a fleet root and its certificate authority, wrapped if there is a passphrase.

    Raises:
        IdentityError: there is one already, or the passphrase is too short.
    """
    check_name("group", group)
    if (fleet_dir / "root.key").exists():
        raise IdentityError(f"{fleet_dir}: already has a fleet root; choose another directory")
    root = Ed25519PrivateKey.generate()
    write_secret(fleet_dir / "root.key", root.private_bytes_raw(), passphrase=passphrase)
    public = root.public_key().public_bytes_raw().hex()
    _write_json(fleet_dir / "fleet.json", {"group": group, "root": public})
    write_authority(fleet_dir, new_authority(root, group, now_s=now_s), passphrase=passphrase)


def add_gateway(
    fleet_dir: Path,
    gateway_dir: Path,
    gateway_id: str,
    *,
    enrols: bool = True,
    now_s: float | None = None,
    passphrase: PassphraseSource = passphrase_from_environment,
) -> GatewayIdentity:
    """Make a gateway's key and have the root certify it for a year.

    Args:
        fleet_dir: the fleet's, with the root.
        gateway_dir: gets the gateway.
        gateway_id: its name.
        enrols: it gets the certificate authority, too, to enrol devices and renew them.
        now_s: the clock, Unix seconds.
        passphrase: asked when the fleet's keys are wrapped.

    Raises:
        IdentityError: the fleet is missing, or `gateway_dir` has a gateway already.
    """
    check_name("gateway", gateway_id)
    if (gateway_dir / "gateway.key").exists():
        raise IdentityError(f"{gateway_dir}: already has a gateway")
    root, group = read_fleet(fleet_dir, passphrase=passphrase)
    # A fleet from before there were authorities has none.
    if enrols and (fleet_dir / "ca.key").exists():
        write_authority(gateway_dir, load_authority(fleet_dir, passphrase=passphrase))
    public = root.public_key().public_bytes_raw()
    write_atomic(gateway_dir / ROOT_FILE, public.hex().encode())
    _write_json(gateway_dir / "gateway.json", {"group": group, "gateway": gateway_id})
    certify_gateway(root, fleet_dir, gateway_dir, group, gateway_id, now_s=now_s)
    return load_gateway(gateway_dir)


def certify_gateway(
    root: Ed25519PrivateKey,
    fleet_dir: Path,
    gateway_dir: Path,
    group: str,
    gateway_id: str,
    *,
    now_s: float | None = None,
) -> None:
    """Give a gateway a new signing key and the root's certificate for it.

    Devices believe whatever the root certifies, so the old key's adverts and the new key's are
    both good until the old certificate ends, or until the old key is revoked.

    Raises:
        IdentityError: the fleet's list of revoked gateways cannot be read.
    """
    key = Ed25519PrivateKey.generate()
    revoked = read_revocations(fleet_dir, root.public_key(), group)
    nbf_s = int(time.time() if now_s is None else now_s)
    # Later than what is revoked, even within the same second.
    nbf_s = max(nbf_s, revoked.until_s.get(gateway_id, -1) + 1)
    # Before there is a key: whatever was certified is found by a revocation.
    certified = _certified(fleet_dir)
    latest_s = max(nbf_s, certified.get(gateway_id, 0))
    _write_json(fleet_dir / CERTIFIED_FILE, {**certified, gateway_id: latest_s})
    certificate = statements.sign(
        root,
        CERTIFICATE_LABEL,
        {
            "group": group,
            "gateway": gateway_id,
            "key": key.public_key().public_bytes_raw().hex(),
            "nbf": nbf_s,
            "naf": nbf_s + CERTIFICATE_VALID_S,
        },
    )
    write_atomic(gateway_dir / "gateway.cert", certificate)
    write_atomic(gateway_dir / "gateway.key", key.private_bytes_raw())


def _certified(fleet_dir: Path) -> dict[str, int]:
    """When the fleet last certified a key of each gateway; nothing of those from before it kept."""
    path = fleet_dir / CERTIFIED_FILE
    if not path.exists():
        return {}
    try:
        fields = json.loads(read_public(path))
        return {name: statements.integer(fields, name) for name in fields}
    except (ValueError, TypeError, AttributeError):
        raise IdentityError(f"{path}: must be a JSON object") from None


def certify_for_broker(fleet_dir: Path, gateway_dir: Path, *, passphrase: PassphraseSource) -> None:
    """Give a gateway the certificate with which it connects to the fleet's own broker.

    Raises:
        IdentityError: the fleet has no certificate authority, or no gateway is there.
    """
    authority = load_authority(fleet_dir, passphrase=passphrase)
    gateway_id = statements.text(json.loads(read_public(gateway_dir / "gateway.json")), "gateway")
    made = issue_gateway(authority.current, gateway_id)
    write_atomic(gateway_dir / BROKER_CA, authority.bundle_pem)
    write_atomic(gateway_dir / BROKER_KEY, made.key_pem)
    write_atomic(gateway_dir / BROKER_CERTIFICATE, made.certificate_pem)


def add_device(fleet_dir: Path, device_dir: Path, gateway_dirs: Sequence[Path]) -> DeviceIdentity:
    """Make a device's keys, id and handle, and register it at the given gateways.

    Raises:
        IdentityError: the fleet is missing, or `device_dir` has a device already.
    """
    if (device_dir / "device.key").exists():
        raise IdentityError(f"{device_dir}: already has a device")
    root, group = read_fleet(fleet_dir)
    key = Ed25519PrivateKey.generate()
    device_id = DeviceId(secrets.token_bytes(16))
    handle = secrets.token_hex(HANDLE_CHARACTERS // 2)
    record = DeviceRecord(
        device_id=device_id,
        handle=handle,
        public_key=key.public_key().public_bytes_raw(),
        revoked=False,
    )
    for gateway_dir in gateway_dirs:
        registry = DeviceRegistry(gateway_dir / "devices.sqlite")
        registry.add(record)
        registry.close()
    fields = {
        "group": group,
        "device_id": device_id.hex(),
        "handle": handle,
        "root": root.public_key().public_bytes_raw().hex(),
    }
    _write_json(device_dir / "device.json", fields)
    write_atomic(device_dir / "device.key", key.private_bytes_raw())
    return load_device(device_dir)


def revoke_gateway(
    fleet_dir: Path,
    gateway_id: str,
    *,
    now_s: float | None = None,
    passphrase: PassphraseSource = passphrase_from_environment,
) -> Revocations:
    """Stop believing every key that was certified for a gateway by now; the fleet keeps the list.

    One that was certified while a clock was ahead is among them: the fleet has kept when.

    Raises:
        IdentityError: there is no fleet, or its list is damaged or full.
    """
    root, group = read_fleet(fleet_dir, passphrase=passphrase)
    before = read_revocations(fleet_dir, root.public_key(), group)
    now_s = time.time() if now_s is None else now_s
    now_s = max(now_s, _certified(fleet_dir).get(gateway_id, 0))
    made = seal_revocations(root, group, before, gateway_id, now_s=now_s)
    write_atomic(fleet_dir / REVOKED_FILE, made.statement)
    return made


def pair(device_dir: Path, gateway_dir: Path) -> None:
    """Make one device and one gateway that know each other; does nothing when both exist.

    For demos and tests: the fleet root stays in `gateway_dir/fleet`, which a real fleet keeps
    offline.
    """
    fleet_dir = gateway_dir / "fleet"
    if not (fleet_dir / "root.key").exists():
        create_fleet(fleet_dir)
    if not (gateway_dir / "gateway.key").exists():
        add_gateway(fleet_dir, gateway_dir, "gw0")
    if not (device_dir / "device.key").exists():
        add_device(fleet_dir, device_dir, [gateway_dir])


def read_fleet(
    fleet_dir: Path, *, passphrase: PassphraseSource = passphrase_from_environment
) -> tuple[Ed25519PrivateKey, str]:
    """The fleet's root and group.

    Raises:
        IdentityError: there is no fleet, or its root cannot be used.
    """
    fields = json.loads(read_public(fleet_dir / "fleet.json"))
    key = Ed25519PrivateKey.from_private_bytes(
        read_key(fleet_dir / "root.key", passphrase=passphrase)
    )
    return key, check_name("fleet.json group", statements.text(fields, "group"))


def _write_json(path: Path, fields: Mapping[str, object]) -> None:
    write_atomic(path, json.dumps(fields, indent=2, sort_keys=True).encode())
