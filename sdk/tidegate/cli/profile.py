"""Show what is known of boards: their power modes, sensors, energy, and where each number is from.

`calibrate` measures what a bundle costs on this very device and keeps it for `tidegate serve`.

Example:
  tidegate profile list
  tidegate profile detect --json
  tidegate profile show raspberry-pi-5
  tidegate profile sensors
  tidegate profile check
  tidegate profile calibrate assistant --minutes 2
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidegate.cli import calibrate, profile_sensors

if TYPE_CHECKING:
    from tidegate.edge.energy.profile import Profile
    from tidegate.edge.energy.profile_files import Library


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--overlays", type=Path, metavar="DIR", help="(default: /etc/tidegate/profile.d)"
    )
    common.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="(default: /var/lib/tidegate/calibration.toml)",
    )
    common.add_argument("--json", action="store_true", help="print JSON")
    board = argparse.ArgumentParser(add_help=False)
    board.add_argument(
        "--sysroot", type=Path, default=Path("/"), help="where the machine's files are (default /)"
    )
    board.add_argument("--arch", help="its architecture (default: of this machine)")
    kinds.add_parser("list", parents=[common], help="every board that is known")
    kinds.add_parser("detect", parents=[common, board], help="which one this machine is, and why")
    show = kinds.add_parser("show", parents=[common, board], help="all that is known of one")
    show.add_argument("profile", help="its id, or auto for this machine's")
    profile_sensors.add_parser(kinds, [common, board])
    check = kinds.add_parser("check", parents=[common], help="check all profiles, or some files")
    check.add_argument("file", type=Path, nargs="*", help="further files to check with them")
    calibrated = kinds.add_parser(
        "calibrate", parents=[common], help="measure what a bundle costs on this device"
    )
    calibrate.add_arguments(calibrated)


def run(args: argparse.Namespace) -> int:
    """Print it."""
    commands = {
        "list": _list,
        "detect": _detect,
        "show": _show,
        "check": _check,
        "sensors": _sensors,
        "calibrate": calibrate.run,
    }
    commands[args.kind](args)
    return 0


def _library(args: argparse.Namespace) -> Library:
    from tidegate.edge.energy.profile_files import CALIBRATION, OVERLAYS, read_library

    return read_library(args.overlays or OVERLAYS, args.calibration or CALIBRATION)


def _list(args: argparse.Namespace) -> None:
    rows = [
        {
            "id": one.id,
            "title": one.title,
            "status": one.status,
            "power_modes": [mode.name for mode in one.power.mode],
            "energy_points": sum(point.active_w is not None for point in one.energy.point),
        }
        for one in _library(args).every()
    ]
    if args.json:
        _print_json(rows)
        return
    for row in rows:
        points = row["energy_points"] or "none"
        print(f"{row['id']:<28} {row['title']} ({row['status']}; runs with watts: {points})")


def _detect(args: argparse.Namespace) -> None:
    from tidegate.edge.energy.profile_detect import detect, read_board

    found = detect(read_board(args.sysroot, args.arch), _library(args).every())
    if args.json:
        row = {"id": found.profile.id, "reasons": found.reasons, "others": found.others}
        _print_json(row)
        return
    print(found.profile.id)
    for reason in found.reasons:
        print(f"  {reason}")


def _sensors(args: argparse.Namespace) -> None:
    profile_sensors.show_sensors(args, _wanted(args, _library(args)))


def _wanted(args: argparse.Namespace, library: Library) -> Profile:
    from tidegate.edge.energy.profile_detect import detect, read_board

    if args.profile == "auto":
        return detect(read_board(args.sysroot, args.arch), library.every()).profile
    return library.profile(args.profile)


def _show(args: argparse.Namespace) -> None:
    library = _library(args)
    profile = _wanted(args, library)
    table = _without_unknown(asdict(profile))
    if args.json:
        _print_json(table)
        return
    print(f"from {', '.join(library.files_of(profile.id))}")
    for line in _lines(table, ""):
        print(line)


def _check(args: argparse.Namespace) -> None:
    from tidegate.edge.energy.profile_files import with_files

    library = _library(args)
    if args.file:
        library = with_files(library, args.file)
    profiles = library.every()
    if args.json:
        _print_json({"profiles": [one.id for one in profiles]})
    else:
        print(f"{len(profiles)} profiles: good", file=sys.stderr)


def _without_unknown(value: Any) -> Any:
    """Without what nobody gave; `from_` is written as in the file."""
    if isinstance(value, dict):
        inner = ((key.removesuffix("_"), _without_unknown(one)) for key, one in value.items())
        return {key: one for key, one in inner if one not in (None, {}, [])}
    if isinstance(value, tuple | list):
        return [_without_unknown(one) for one in value]
    return value


def _lines(value: Any, path: str) -> list[str]:
    """`path = value`, one line for each."""
    if isinstance(value, dict):
        start = f"{path}." if path else ""
        return [line for key, one in value.items() for line in _lines(one, start + key)]
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return [line for n, one in enumerate(value) for line in _lines(one, f"{path}[{n}]")]
    return [f"{path} = {json.dumps(value)}"]


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))
