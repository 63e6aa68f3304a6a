"""Ask a running device where it would run a call and why; nothing is run.

Shows what either way counts in joules, how late it would be, the power mode and why, and what the
decision rests on: weights, battery, heat, load.

Example:
  tidegate route explain "turn on the lamp in the kitchen" --deadline-ms 700
  tidegate route explain "a long report" --privacy local --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from tidegate.errors import RequestError

if TYPE_CHECKING:
    from rich.table import Table

    from tidegate.client import Explanation

_LOG_COLUMNS = 100
"""Width where there is no terminal to ask."""
_PLACES = {
    "edge": "on the device",
    "cloud": "in the cloud",
    "cache": "from kept answers",
    "wait": "it would wait",
    "refuse": "refused",
}
_NO_PROFILE = "the clock alone decides: the device serves without a profile"
_NO_CHOICE = "does not count here: only one place is left, or the scheduler was not to be asked"
_NO_WATTS = "watts of this board are unknown: only time and price count"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    explain = kinds.add_parser("explain", help="show where a chat would run now and why")
    explain.add_argument("prompt", help="what would be asked")
    explain.add_argument("--url", default="http://127.0.0.1:8080", help="of the device")
    explain.add_argument("--api-key", help="for a device that wants one")
    explain.add_argument(
        "--privacy", choices=("local", "redact", "sealed", "any"), default="sealed"
    )
    explain.add_argument("--route", choices=("auto", "edge", "cloud"), default="auto")
    explain.add_argument("--priority", choices=("interactive", "normal", "background"))
    explain.add_argument("--deadline-ms", type=int, help="until the whole answer should be there")
    explain.add_argument("--max-tokens", type=int, help="longest answer")
    explain.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    """Ask and print."""
    from tidegate.client import Client

    with Client(args.url, api_key=args.api_key) as client:
        try:
            found = client.explain(
                args.prompt,
                privacy=args.privacy,
                route=args.route,
                priority=args.priority,
                deadline_ms=args.deadline_ms,
                max_tokens=args.max_tokens,
            )
        except RequestError as error:
            if error.status == 404:
                problem = "has no choice of routes to explain; a device of this version has"
                raise RequestError(args.url, problem, status=404) from error
            raise
    if args.json:
        print(json.dumps(found.told, indent=2))
    else:
        _print(found)
    return 0


def _print(found: Explanation) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _LOG_COLUMNS
    place = _PLACES.get(found.route, found.route)
    console.print(Text(place, style="bold"), Text(f": {found.reason}"), sep="")
    if found.pace is not None:
        why = found.pace.more.get("mode_reason") or found.pace.reason
        console.print(f"power mode {found.pace.mode}: {why}", markup=False)
    console.print()
    console.print(_places(found))
    if found.pace is not None and _knows_no_watts(found):
        console.print(_NO_WATTS, markup=False)
    for title, facts in _facts(found):
        console.print()
        console.print(_listed(title, facts))


def _places(found: Explanation) -> Table:
    """Both ways beside each other."""
    from rich.table import Table

    from tidegate.cli.energy_text import joules_text

    table = Table(box=None)
    table.add_column("")
    table.add_column("device", justify="right")
    table.add_column("cloud", justify="right")
    table.add_row("predicted", _seconds(found.edge_s, "-"), _seconds(found.cloud_s, "-"))
    pace = found.pace
    if pace is not None:
        late = (pace.late_local_s, pace.late_cloud_s)
        table.add_row("late by, 9 of 10", *(_seconds(one, "closed") for one in late))
        no_joules = ("unknown" if _knows_no_watts(found) else "closed", "closed")
        joules = zip((pace.local_j, pace.cloud_j), no_joules, strict=True)
        table.add_row(
            "counts as", *(none if one is None else joules_text(one) for one, none in joules)
        )
    return table


def _knows_no_watts(found: Explanation) -> bool:
    return str(found.state.get("costs")).endswith("unknown")


def _seconds(value: float | None, unknown: str) -> str:
    return unknown if value is None else f"{value:.2f} s"


def _facts(found: Explanation) -> Iterator[tuple[str, Mapping[str, object]]]:
    """What the decision rests on, in parts."""
    if isinstance(found.filters, Mapping):
        yield "places", {name: one or "open" for name, one in found.filters.items()}
    elif found.filters:
        yield "places", {"closed": found.filters}
    if found.pace is None:
        yield "energy", {"": _NO_CHOICE if "mode" in found.state else _NO_PROFILE}
    elif found.pace.more:
        yield "scheduler", found.pace.more
    if found.state:
        yield "state", found.state


def _listed(title: str, facts: Mapping[str, object]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for name, value in _flat("", facts):
        table.add_row(Text(name), Text(_text(value)))
    return table


def _flat(prefix: str, value: object) -> Iterator[tuple[str, object]]:
    """Nested facts one after another, each with the names that lead to it."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from _flat(f"{prefix} {name}".strip().replace("_", " "), one)
    elif isinstance(value, list):
        for one in value:
            yield from _flat(prefix, one)
        if not value:
            yield prefix, "none"
    else:
        yield prefix, value


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else str(value)
