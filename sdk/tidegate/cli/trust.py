"""The `--trust` flag: whose bundles a command accepts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Declare the flag."""
    parser.add_argument(
        "--trust",
        type=Path,
        action="append",
        metavar="FILE.pub",
        help="accept only bundles signed by this public key; may be given more than once",
    )


def read_trust(files: Sequence[Path] | None) -> frozenset[str] | None:
    """The trusted public keys, None when any signer or none will do."""
    from tidegate.model.signature import read_public_key

    return None if files is None else frozenset(read_public_key(path) for path in files)
