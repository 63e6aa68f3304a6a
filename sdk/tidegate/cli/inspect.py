"""Verify a bundle and show what it holds.

Example:
  tidegate inspect assistant
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tidegate.cli.convert import print_summary, summary
from tidegate.cli.trust import add_trust, read_trust
from tidegate.model.bundle import Bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    """Open the bundle, which verifies every file, and print."""
    bundle = Bundle.open(args.bundle, trusted=read_trust(args.trust))
    if args.json:
        print(json.dumps(summary(bundle), indent=2))
    else:
        print_summary(bundle)
    return 0
