"""Write a folder that mosquitto 2 runs from: configuration, access rules, certificate, key.

TLS 1.3 and client certificates of the fleet only; each client reaches its own topics only. Run it
again for another gateway, a new certificate or a new list of revoked devices, then send mosquitto
SIGHUP. docs/deploy/mosquitto.md goes through it.

Example:
  tidegate broker config broker/ --fleet fleet/ --gateway gw0 --host broker.example
  mosquitto -c broker/mosquitto.conf
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--fleet", type=Path, required=True, help="folder of the fleet's root")
    parser.add_argument(
        "--gateway",
        action="append",
        required=True,
        metavar="NAME",
        help="a gateway that may connect; may be given more than once",
    )
    parser.add_argument(
        "--host",
        action="append",
        required=True,
        metavar="NAME",
        help="a name or address that clients call the broker by; may be given more than once",
    )
    parser.add_argument("--port", type=int, default=8883, help="port to listen on (default 8883)")
    parser.add_argument("--bind", metavar="ADDRESS", help="listen on this address only")
    parser.add_argument(
        "--installed-at",
        type=Path,
        metavar="DIR",
        help="where the folder will lie on the broker's machine (default: where it is written)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="where mosquitto keeps retained messages (default: data/ in the folder)",
    )
    parser.add_argument(
        "--revoked",
        type=Path,
        metavar="FILE",
        help="the revoked.pem of a gateway's folder, once a device has been revoked",
    )


def run(args: argparse.Namespace) -> int:
    """Write the folder and say what to do with it."""
    from tidegate.link.certificates import issue_server, revocation_list
    from tidegate.link.certificates_store import load_authority
    from tidegate.link.fleet import read_fleet
    from tidegate.link.keyfiles import read_public
    from tidegate.link.mosquitto import CONFIG, KEY, MosquittoSettings, write_folder

    authority = load_authority(args.fleet)
    _, group = read_fleet(args.fleet)
    installed_at = (args.installed_at or args.folder).absolute()
    data = args.data.absolute() if args.data else installed_at / "data"
    settings = MosquittoSettings(
        group=group,
        gateways=tuple(args.gateway),
        installed_at=installed_at,
        data=data,
        port=args.port,
        bind=args.bind,
    )
    if args.revoked is None:
        revoked = b"".join(revocation_list(key, []) for key in authority.keys)
    else:
        revoked = read_public(args.revoked, max_bytes=16 << 20)
    write_folder(
        args.folder,
        settings,
        ca_pem=authority.bundle_pem,
        server=issue_server(authority.current, args.host),
        revoked_pem=revoked,
    )
    if args.data is None and args.installed_at is None:
        data.mkdir(exist_ok=True)
    print(f"mosquitto -c {installed_at / CONFIG}", file=sys.stderr)
    print(f"the user it runs as must be able to read {KEY} and write {data}", file=sys.stderr)
    return 0
