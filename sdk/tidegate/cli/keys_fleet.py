"""`tidegate keys init|gateway|show|rotate|wrap`: a fleet's own keys."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.cli.keys_passphrase import add_passphrase, new_passphrase, passphrase_source
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.link.wrapping import PassphraseSource

    Kinds = argparse._SubParsersAction[argparse.ArgumentParser]


def add_kinds(kinds: Kinds) -> None:
    """Declare the commands and their flags."""
    init = kinds.add_parser("init", help="make a fleet and its first gateway")
    init.add_argument("fleet", type=Path, help="folder for the root: keep it offline")
    init.add_argument("gateway", type=Path, help="folder for the gateway's keys")
    init.add_argument("--group", default="home", help="name of the fleet in topics (default home)")
    init.add_argument("--name", default="gw0", help="the gateway's name (default gw0)")
    add_passphrase(init)
    gateway = kinds.add_parser("gateway", help="make another gateway of a fleet")
    gateway.add_argument("fleet", type=Path, help="folder of the fleet")
    gateway.add_argument("gateway", type=Path, help="folder for the gateway's keys")
    gateway.add_argument("--name", required=True, help="the gateway's name")
    gateway.add_argument(
        "--no-enrolment", action="store_true", help="it gets no authority to enrol devices"
    )
    add_passphrase(gateway)
    show = kinds.add_parser("show", help="show what a folder of keys is, never a secret")
    show.add_argument("folder", type=Path, help="a fleet's, a gateway's or a device's")
    rotate = kinds.add_parser("rotate", help="replace a key, the old one good for a while")
    rotate.add_argument("what", choices=("gateway", "prekeys", "ca", "device"), help="which key")
    rotate.add_argument("--fleet", type=Path, help="folder of the fleet, for gateway and ca")
    rotate.add_argument("folders", type=Path, nargs="+", metavar="folder", help="whose keys")
    rotate.add_argument(
        "--drop-old", action="store_true", help="ca: forget the old ones, when all have renewed"
    )
    add_passphrase(rotate)
    wrap = kinds.add_parser("wrap", help="put a key file under a passphrase")
    wrap.add_argument("file", type=Path, help="root.key, ca.key, gateway.key or device.key")
    add_passphrase(wrap)


def init(args: argparse.Namespace) -> None:
    """Make a fleet and a gateway that enrols devices."""
    from tidegate.link.enrolment_device import fingerprint
    from tidegate.link.fleet import add_gateway, certify_for_broker, create_fleet
    from tidegate.link.identity import read_root

    secret = new_passphrase(args)
    source = passphrase_source(args) if secret is None else (lambda: secret)
    create_fleet(args.fleet, group=args.group, passphrase=secret)
    add_gateway(args.fleet, args.gateway, args.name, passphrase=source)
    certify_for_broker(args.fleet, args.gateway, passphrase=source)
    _write_empty_list(args.gateway)
    told = fingerprint(read_root(args.gateway))
    _say(f"fleet {args.group!r} in {args.fleet}, gateway {args.name!r} in {args.gateway}")
    _say(f"root {told}; keep {args.fleet} offline")


def gateway(args: argparse.Namespace) -> None:
    """Make another gateway."""
    from tidegate.link.fleet import add_gateway, certify_for_broker

    source, enrols = passphrase_source(args), not args.no_enrolment
    add_gateway(args.fleet, args.gateway, args.name, enrols=enrols, passphrase=source)
    certify_for_broker(args.fleet, args.gateway, passphrase=source)
    if enrols:
        _write_empty_list(args.gateway)
    _say(f"gateway {args.name!r} in {args.gateway}")


def _write_empty_list(folder: Path) -> None:
    """The broker's list of revoked certificates must be there before anyone is revoked."""
    from contextlib import closing

    from tidegate.link.enrolment_gateway import Enrolment

    with closing(Enrolment(folder)) as enrolment:
        enrolment.write_revocations()


def show(args: argparse.Namespace) -> None:
    """Print what a folder holds."""
    from tidegate.cli.keys_show import describe

    for name, value in describe(args.folder):
        print(f"{name + ':':24}{value}")


def rotate(args: argparse.Namespace) -> None:
    """Replace a key."""
    from tidegate.link import fleet_rotation

    source = passphrase_source(args)
    if args.what == "device":
        _rotate_devices(args.folders, source)
        return
    if args.what == "prekeys":
        for folder in args.folders:
            fleet_rotation.rotate_prekeys(folder)
            _say(f"{folder}: a new prekey; the old ones end by themselves within 72 h")
        return
    if args.fleet is None:
        raise ConfigError("fleet", None, f"the fleet's folder, to rotate its {args.what}")
    if args.what == "gateway":
        for folder in args.folders:
            fleet_rotation.rotate_gateway(args.fleet, folder, passphrase=source)
            _say(f"{folder}: a new signing key, in use from the gateway's next start on")
        return
    turn = fleet_rotation.drop_old_authorities if args.drop_old else fleet_rotation.rotate_authority
    authority = turn(args.fleet, args.folders, passphrase=source)
    _say(f"{len(authority.keys)} certificate authorities, the newest signs")
    _say("give the broker the new ca.pem and revoked.pem, and start the gateways again")


def _rotate_devices(folders: Sequence[Path], source: PassphraseSource) -> None:
    from tidegate.link.key_rotation import stage

    for folder in folders:
        if stage(folder, passphrase=source):
            _say(f"{folder}: a new signing key; the daemon brings it into use at every gateway")
        else:
            _say(f"{folder}: a new key is on its way already; the daemon's log says what it lacks")


def wrap(args: argparse.Namespace) -> None:
    """Put a key under a passphrase."""
    from tidegate.link.keyfiles import passphrase_from_environment, rewrite_secret

    if args.file.suffix == ".pem":
        raise ConfigError("file", str(args.file), "a .key file: TLS reads its PEM key itself")
    secret = new_passphrase(args)
    if secret is None:
        raise ConfigError("passphrase", None, "--ask-passphrase, --passphrase-file or -env")
    rewrite_secret(args.file, secret, before=passphrase_from_environment)
    _say(f"{args.file} is wrapped; services find its passphrase in TIDEGATE_PASSPHRASE_FILE")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "init": init,
    "gateway": gateway,
    "show": show,
    "rotate": rotate,
    "wrap": wrap,
}
