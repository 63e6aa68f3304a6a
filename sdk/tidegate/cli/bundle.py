"""Sign a bundle, pack it into one file, or unpack one that was verified.

Example:
  tidegate keys signing maker
  tidegate bundle sign assistant --key maker.key
  tidegate bundle pack assistant assistant.tar.zst
  tidegate bundle unpack assistant.tar.zst installed --trust maker.pub
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tidegate.cli.trust import add_trust, read_trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="sign|pack|unpack")
    sign = kinds.add_parser("sign", help="put a signature into the manifest")
    sign.add_argument("bundle", type=Path, help="folder of the bundle")
    sign.add_argument(
        "--key", type=Path, required=True, help="file made by `tidegate keys signing`"
    )
    pack = kinds.add_parser("pack", help="write a bundle as one file")
    pack.add_argument("bundle", type=Path, help="folder of the bundle")
    pack.add_argument("archive", type=Path, help="file to write, such as assistant.tar.zst")
    unpack = kinds.add_parser("unpack", help="verify an archive while unpacking it")
    unpack.add_argument("archive", type=Path, help="file that `pack` wrote")
    unpack.add_argument("bundle", type=Path, help="folder to write, or a bundle to replace")
    unpack.add_argument(
        "--allow-older", action="store_true", help="replace a newer version of the same model"
    )
    add_trust(unpack)
    for kind in (pack, unpack):
        kind.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Do what the subcommand says."""
    from tidegate.cli.progress import progress_bars
    from tidegate.errors import ConfigError
    from tidegate.model.archive import pack, unpack
    from tidegate.model.bundle import Bundle, replace_manifest
    from tidegate.model.signature import SigningKey

    if args.kind == "sign":
        bundle = Bundle.open(args.bundle)
        key = SigningKey.read(args.key)
        replace_manifest(bundle, key.sign(bundle.manifest))
        print(f"{args.bundle}: signed by {key.public}", file=sys.stderr)
        return 0
    if args.kind == "pack" and not args.archive.parent.is_dir():
        raise ConfigError("archive", str(args.archive), "a file in a folder that exists")
    with progress_bars(quiet=args.quiet) as report:
        if args.kind == "pack":
            pack(Bundle.open(args.bundle), args.archive, report)
        else:
            unpack(
                args.archive,
                args.bundle,
                trusted=read_trust(args.trust),
                allow_older=args.allow_older,
                progress=report,
            )
    written = args.archive if args.kind == "pack" else args.bundle
    print(f"{written}: written", file=sys.stderr)
    return 0
