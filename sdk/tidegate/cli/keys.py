"""Make and look after keys: of a fleet and its devices, to sign bundles, and API keys for HTTP.

`pair` makes one device and one gateway for a trial; `init`, `token` and `tidegate enroll` make a
fleet (docs/identity.md).

Example:
  tidegate keys pair device/ gateway/
  tidegate keys init fleet/ gateway/
  tidegate keys token gateway/ --url http://gateway.local:8091
  tidegate keys signing maker
  tidegate keys api >> keys.txt
  tidegate keys api add state/ team-a --requests 60/minute --quota-tokens-month 2000000
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tidegate.cli import keys_api, keys_devices, keys_fleet, keys_revoke


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    pair = kinds.add_parser("pair", help="make one device and one gateway that know each other")
    pair.add_argument("device", type=Path, help="folder for the device's keys")
    pair.add_argument("gateway", type=Path, help="folder for the gateway's keys")
    keys_fleet.add_kinds(kinds)
    keys_devices.add_kinds(kinds)
    keys_revoke.add_kinds(kinds)
    signing = kinds.add_parser("signing", help="make a key to sign bundles with")
    signing.add_argument("name", help="write NAME.key, to keep secret, and NAME.pub, to give away")
    keys_api.add_kinds(
        kinds.add_parser(
            "api", help="API keys with limits; alone: a new key on stderr, its hash on stdout"
        )
    )


def run(args: argparse.Namespace) -> int:
    """Make the keys."""
    commands = {"pair": _pair, "signing": _signing, "api": _api}
    every = commands | keys_fleet.COMMANDS | keys_devices.COMMANDS | keys_revoke.COMMANDS
    every[args.kind](args)
    return 0


def _pair(args: argparse.Namespace) -> None:
    from tidegate.link.fleet import pair

    pair(args.device, args.gateway)
    print(f"device keys in {args.device}, gateway keys in {args.gateway}", file=sys.stderr)


def _signing(args: argparse.Namespace) -> None:
    from tidegate.errors import ConfigError
    from tidegate.model.signature import SigningKey

    public = Path(f"{args.name}.pub")
    if public.exists():
        raise ConfigError("public key", str(public), "a new file: a key is not replaced")
    signing = SigningKey.generate()
    signing.write(Path(f"{args.name}.key"))
    public.write_text(signing.public + "\n")
    print(f"secret in {args.name}.key, public in {args.name}.pub", file=sys.stderr)


def _api(args: argparse.Namespace) -> None:
    if args.api_kind is not None:
        keys_api.COMMANDS[args.api_kind](args)
        return
    from tidegate.api.keys import hash_key, new_key

    key = new_key()
    print(f"key, shown once: {key}", file=sys.stderr)
    print(hash_key(key))
