"""Export what every call by an API key used and cost, for a bill or a spreadsheet.

Example:
  tidegate usage export state/ --from 2026-11-01 --to 2026-12-01 --format csv > november.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from tidegate.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    export = kinds.add_parser("export", help="print one row for each call on stdout")
    export.add_argument("state", type=Path, help="the folder that tidegate cloud --state has")
    export.add_argument("--from", dest="from_", default="1970-01-01", help="first day or time, UTC")
    export.add_argument("--to", help="the day or time after the last, UTC (default: now)")
    export.add_argument("--format", choices=("csv", "jsonl"), default="csv")


def run(args: argparse.Namespace) -> int:
    """Print the rows."""
    from tidegate.cloud.usage import FILE, UsageBook, exported

    if not (args.state / FILE).exists():
        raise ConfigError("state", str(args.state), "a folder that a cloud service has written to")
    from_s = _time("from", args.from_)
    to_s = time.time() if args.to is None else _time("to", args.to)
    writer = None
    with closing(UsageBook(args.state)) as book:
        pruned_s = book.pruned_before_s
        if from_s < pruned_s:
            day = datetime.fromtimestamp(pruned_s, UTC).date()
            print(f"tidegate usage: calls before {day} were deleted", file=sys.stderr)
        for row in map(exported, book.rows(from_s, to_s)):
            if args.format == "jsonl":
                sys.stdout.write(json.dumps(row) + "\n")
                continue
            if writer is None:
                writer = csv.DictWriter(sys.stdout, tuple(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
        if from_s < book.pruned_before_s != pruned_s:
            print("tidegate usage: calls were deleted meanwhile: export again", file=sys.stderr)
            return 1
    return 0


def _time(flag: str, text: str) -> float:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(flag, text, "a day or time, as 2026-11-21 or 2026-11-21T08:00") from None
    return (found.replace(tzinfo=UTC) if found.tzinfo is None else found).timestamp()
