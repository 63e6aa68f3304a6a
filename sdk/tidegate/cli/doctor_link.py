"""Look at a device's or gateway's way through the broker, step by step, and say how to mend it.

Status 0: nothing is wrong (there may be warnings). 1: something is. 2: wrong use of this command.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidegate.cli.doctor_link_checks import Finding

_SIGNS = {"ok": "ok", "warning": "WARNING", "failed": "FAILED", "skipped": "not looked at"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `tidegate doctor link`."""
    link = parser.add_argument_group("the link", "for `tidegate doctor link`")
    link.add_argument("--link", metavar="URL", help="mqtts://... of the broker")
    link.add_argument("--keys", type=Path, help="folder of the device's or gateway's keys")
    link.add_argument(
        "--link-http",
        action="append",
        default=[],
        metavar="URL",
        help="https://... of a gateway; may be given more than once, with --link or alone",
    )
    link.add_argument(
        "--link-http-plain", action="store_true", help="allow http:// beyond this machine"
    )
    link.add_argument(
        "--wait",
        type=float,
        default=25.0,
        metavar="SECONDS",
        help="how long to wait for a gateway to announce itself (default 25; they do every 20)",
    )


def run(args: argparse.Namespace) -> int:
    """Look, print; status 1 when something is wrong."""
    from tidegate.cli.doctor_link_checks import examine
    from tidegate.errors import ConfigError
    from tidegate.link.broker_url import BrokerUrl

    if args.link is None and not args.link_http:
        raise ConfigError("link", None, "the broker's URL, as in --link mqtts://broker.example")
    if args.keys is None:
        raise ConfigError("keys", None, "the folder of the device's or gateway's keys")
    findings: list[Finding] = []
    if args.link is not None:
        BrokerUrl.parse(args.link)
        findings += asyncio.run(examine(args.link, args.keys, wait_s=args.wait))
    if args.link_http:
        from tidegate.cli.doctor_link_http import examine_http

        plain = args.link_http_plain
        findings += asyncio.run(examine_http(args.link_http, args.keys, plain=plain))
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    return int(any(finding.state == "failed" for finding in findings))


def _print(findings: Sequence[Finding]) -> None:
    for finding in findings:
        print(f"{finding.check:12} {_SIGNS[finding.state]}: {finding.what}")
        if finding.mend:
            print(f"{'':12} mend: {finding.mend}")
    failed = sum(finding.state == "failed" for finding in findings)
    print(f"tidegate doctor link: {failed} failed" if failed else "tidegate doctor link: fine")
    sys.stdout.flush()
