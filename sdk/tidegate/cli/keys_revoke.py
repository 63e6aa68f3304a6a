"""`tidegate keys revoke-gateway|import-revoked`: a gateway's stolen key is believed no longer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.cli.keys_passphrase import add_passphrase, passphrase_source

if TYPE_CHECKING:
    Kinds = argparse._SubParsersAction[argparse.ArgumentParser]


def add_kinds(kinds: Kinds) -> None:
    """Declare the commands and their flags."""
    revoke = kinds.add_parser(
        "revoke-gateway", help="refuse every key that was certified for a gateway by now"
    )
    revoke.add_argument("fleet", type=Path, help="folder of the fleet, with its root")
    revoke.add_argument("name", help="the gateway's name")
    add_passphrase(revoke)
    taking = kinds.add_parser(
        "import-revoked", help="bring the fleet's list of revoked gateways to a device or gateway"
    )
    taking.add_argument("folder", type=Path, help="of a device's or a gateway's keys")
    taking.add_argument("file", type=Path, help="gateways.revoked from the fleet's folder")


def revoke_gateway(args: argparse.Namespace) -> None:
    """Add a gateway to the fleet's list."""
    from tidegate.link.clock import utc
    from tidegate.link.fleet import revoke_gateway
    from tidegate.link.gateway_revocation import REVOKED_FILE

    made = revoke_gateway(args.fleet, args.name, passphrase=passphrase_source(args))
    path = args.fleet / REVOKED_FILE
    for name, until_s in sorted(made.until_s.items()):
        _say(f"{path} revokes the keys of {name} that were certified up to {utc(until_s)}")
    _say(f"bring it to the other gateways, which tell the devices: keys import-revoked DIR {path}")
    _say("and to devices themselves where the broker may keep it from them")
    _say(f"{args.name} goes on with: keys rotate gateway DIR --fleet {args.fleet}")


def import_revoked(args: argparse.Namespace) -> None:
    """Bring the list to a folder; a service that runs on it notices."""
    from tidegate.link.gateway_revocation import MOST_LIST_BYTES, import_revocations
    from tidegate.link.keyfiles import read_public

    statement = read_public(args.file, max_bytes=MOST_LIST_BYTES)
    taken = import_revocations(args.folder, statement)
    if taken is None:
        _say(f"{args.folder}: has this list or a newer one")
    else:
        _say(f"{args.folder}: the keys of {', '.join(sorted(taken.until_s))} are revoked")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "revoke-gateway": revoke_gateway,
    "import-revoked": import_revoked,
}
