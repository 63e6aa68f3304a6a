"""Telling one gateway which devices another one knows: a list that the other one signs.

What a list says can only be added: a device it does not name stays, one that either side has
revoked is revoked, a key gives way only to one that follows from it, and an old list brings
nothing back. It holds device ids, which no broker may learn, so it travels like a key::

    certificate_bytes u16 | certificate | statement of the gateway key
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tidegate.errors import IdentityError
from tidegate.link import statements
from tidegate.link.clock import check_period
from tidegate.link.device_keys import merged_keys
from tidegate.link.envelope import DeviceId
from tidegate.link.gateway_revocation import NONE_REVOKED, Revocations
from tidegate.link.identity import GatewayIdentity, open_certificate
from tidegate.link.registry import DeviceRecord, DeviceRegistry, insert_device
from tidegate.link.topics import check_name

MOST_DEVICES = 100_000
MOST_LIST_BYTES = 64 * 1024 * 1024
_LABEL = "device list"


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What a list changed."""

    added: int
    revoked: int


def export_devices(identity: GatewayIdentity, registry: DeviceRegistry, *, now_s: float) -> bytes:
    """Every device of a registry, signed.

    Raises:
        IdentityError: there are more than `MOST_DEVICES`, or they make too long a list.
        CapacityError: the registry cannot be read.
    """
    records = registry.devices()
    if len(records) > MOST_DEVICES:
        raise IdentityError(f"{len(records)} devices: a list holds at most {MOST_DEVICES}")
    fields = {
        "group": identity.group,
        "gateway": identity.gateway_id,
        "issued": int(now_s),
        "devices": [
            {
                "id": one.device_id.hex(),
                "handle": one.handle,
                "key": one.public_key.hex(),
                "revoked": int(one.revoked),
                "enrolled": one.enrolled_s,
                # 0 for a device that never had a certificate.
                "expires": one.expires_s or 0,
                "next": "" if one.next_key is None else one.next_key.hex(),
                "history": one.history.hex(),
            }
            for one in records
        ],
    }
    signed = statements.sign(identity.key, _LABEL, fields)
    data = len(identity.certificate).to_bytes(2, "big") + identity.certificate + signed
    if len(data) > MOST_LIST_BYTES:
        raise IdentityError(f"device list: {len(data)} bytes: at most {MOST_LIST_BYTES} are read")
    return data


def import_devices(
    data: bytes,
    *,
    root: bytes,
    group: str,
    registry: DeviceRegistry,
    now_s: float,
    revoked: Revocations = NONE_REVOKED,
) -> Imported:
    """Take in a list from another gateway of the fleet: all of it or nothing.

    Raises:
        IdentityError: it is not from a gateway that the root certified or that is `revoked`, of
            another group, or contradicts what is known of a device.
        CapacityError: the registry cannot be written.
    """
    split = 2 + int.from_bytes(data[:2], "big")
    gateway = open_certificate(Ed25519PublicKey.from_public_bytes(root), data[2:split])
    fields = statements.verify(gateway.key, _LABEL, data[split:])
    check_period("device list: its gateway's key", gateway.nbf_s, gateway.naf_s, now_s)
    if revoked.revokes(gateway.gateway_id, gateway.nbf_s):
        raise IdentityError(f"device list: the key of gateway {gateway.gateway_id} is revoked")
    named = (statements.text(fields, "group"), statements.text(fields, "gateway"))
    if named != (group, gateway.gateway_id) or gateway.group != group:
        raise IdentityError("device list: of another group or gateway than it says")
    theirs = [_record(item) for item in statements.items(fields, "devices", most=MOST_DEVICES)]
    # Read and written in one go: a running gateway may just be taking a device's new key.
    with registry.transaction() as db:
        ours = {one.device_id: one for one in registry.devices()}
        merged = [_merged(one, ours.get(one.device_id)) for one in theirs]
        for record in merged:
            insert_device(db, record)
    return Imported(
        added=sum(one.device_id not in ours for one in merged),
        revoked=sum(
            one.revoked and one.device_id in ours and not ours[one.device_id].revoked
            for one in merged
        ),
    )


def _record(item: object) -> DeviceRecord:
    if not isinstance(item, dict):
        raise IdentityError("device list: a device must be a JSON object")
    return DeviceRecord(
        device_id=DeviceId(statements.hexadecimal(item, "id", 16)),
        handle=check_name("device list handle", statements.text(item, "handle")),
        public_key=statements.hexadecimal(item, "key", 32),
        revoked=statements.integer(item, "revoked") != 0,
        enrolled_s=statements.integer(item, "enrolled"),
        expires_s=statements.integer(item, "expires") or None,
        # Lists from before keys could change have neither.
        next_key=statements.hexadecimal(item, "next", 32) if item.get("next") else None,
        history=_history(item),
    )


def _history(item: dict[str, object]) -> bytes:
    try:
        return bytes.fromhex(statements.text(item, "history")) if "history" in item else b""
    except ValueError:
        raise IdentityError("device list: history: must be hexadecimal") from None


def _merged(theirs: DeviceRecord, ours: DeviceRecord | None) -> DeviceRecord:
    if ours is None:
        return theirs
    if ours.handle != theirs.handle:
        raise IdentityError(
            f"device list: handle {theirs.handle}: is known here with another key or handle"
        )
    ends = [one for one in (ours.expires_s, theirs.expires_s) if one is not None]
    return replace(
        merged_keys(ours, theirs),
        revoked=ours.revoked or theirs.revoked,
        expires_s=max(ends, default=None),
    )
