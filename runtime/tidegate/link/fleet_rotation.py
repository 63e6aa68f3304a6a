"""Replacing a fleet's keys while it runs, so that old and new are good side by side.

A gateway's new signing key counts as soon as the gateway starts with it: devices believe whatever
the root certified. A new certificate authority signs from now on, and what the old one signed stays
good until `drop_old_authorities`, which is after every device has renewed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tidegate.errors import IdentityError
from tidegate.link.certificates_store import (
    CA_KEY,
    Authority,
    has_authority,
    load_authority,
    new_authority,
    without_oldest,
    write_authority,
    write_revocations,
)
from tidegate.link.fleet import certify_for_broker, certify_gateway, read_fleet
from tidegate.link.identity import load_gateway, read_root
from tidegate.link.keyfiles import FolderLock, passphrase_from_environment, read_public
from tidegate.link.prekeys import PrekeyStore
from tidegate.link.registry import DeviceRegistry
from tidegate.link.wrapping import PassphraseSource, is_plain

MOST_PREKEYS = 32
"""Of all suites; the daily ones are 8 at most. Bounds the file."""


def rotate_gateway(
    fleet_dir: Path,
    gateway_dir: Path,
    *,
    passphrase: PassphraseSource = passphrase_from_environment,
) -> None:
    """Replace a gateway's signing key; the gateway must not be running.

    Raises:
        IdentityError: the gateway is another fleet's, or a key cannot be used.
        LinkError: the gateway is running.
    """
    root, group = read_fleet(fleet_dir, passphrase=passphrase)
    if read_root(gateway_dir) != root.public_key().public_bytes_raw():
        raise IdentityError(f"{gateway_dir}: belongs to another fleet than {fleet_dir}")
    if not is_plain(read_public(gateway_dir / "gateway.key")):
        raise IdentityError(
            f"{gateway_dir / 'gateway.key'}: is wrapped; make the new key where its secret is kept"
        )
    lock = FolderLock(gateway_dir)
    try:
        gateway = load_gateway(gateway_dir)
        certify_gateway(root, fleet_dir, gateway_dir, group, gateway.gateway_id)
    finally:
        lock.release()


def rotate_prekeys(gateway_dir: Path, *, now_s: float | None = None) -> None:
    """Make a prekey now; the older ones open what devices have sealed to them until they end.

    Raises:
        LinkError: the gateway is running, which rotates its prekeys every day by itself.
        IdentityError: there are too many that have not ended.
    """
    now_s = time.time() if now_s is None else now_s
    lock = FolderLock(gateway_dir)
    try:
        store = PrekeyStore(gateway_dir / "prekeys.json")
        store.rotate(now_s)
        if len(store) >= MOST_PREKEYS:
            raise IdentityError(
                f"{gateway_dir}: {MOST_PREKEYS} prekeys have not ended yet; each lasts 72 h"
            )
        store.rotate(now_s, at_once=True)
    finally:
        lock.release()


def rotate_authority(
    fleet_dir: Path,
    gateway_dirs: Sequence[Path],
    *,
    passphrase: PassphraseSource = passphrase_from_environment,
) -> Authority:
    """Make a certificate authority that signs from now on; returns it with those before.

    Raises:
        IdentityError: there are too many, or a key cannot be used.
    """
    root, group = read_fleet(fleet_dir, passphrase=passphrase)
    before = load_authority(fleet_dir, passphrase=passphrase)
    made = new_authority(root, group, before=before.keys)
    _spread(made, fleet_dir, gateway_dirs, passphrase)
    return made


def drop_old_authorities(
    fleet_dir: Path,
    gateway_dirs: Sequence[Path],
    *,
    passphrase: PassphraseSource = passphrase_from_environment,
) -> Authority:
    """Forget every authority but the newest, once nothing that they signed is in use.

    Raises:
        IdentityError: there is only one, or a key cannot be used.
    """
    root, group = read_fleet(fleet_dir, passphrase=passphrase)
    left = without_oldest(load_authority(fleet_dir, passphrase=passphrase), root, group)
    _spread(left, fleet_dir, gateway_dirs, passphrase)
    return left


def _spread(
    authority: Authority,
    fleet_dir: Path,
    gateway_dirs: Sequence[Path],
    passphrase: PassphraseSource,
) -> None:
    """Write it to the fleet and to the gateways that have one; wrapped where it was wrapped."""
    for folder in (fleet_dir, *(one for one in gateway_dirs if has_authority(one))):
        wrapped = not is_plain(read_public(folder / CA_KEY))
        write_authority(folder, authority, passphrase=passphrase() if wrapped else None)
    for folder in gateway_dirs:
        certify_for_broker(fleet_dir, folder, passphrase=passphrase)
        with closing(DeviceRegistry(folder / "devices.sqlite")) as registry:
            write_revocations(folder, authority, registry)
