r"""Simulate a device's requests under several policies, with the scheduler that the daemon has.

Example:
  tidegate simulate --profile jetson-orin-nano-8gb-super --policy pace,edf,race --seeds 5
  tidegate simulate --trace azure_conv.csv --profile raspberry-pi-5 --utilisation 0.8 --json
  tidegate simulate --trace home --profile ryzen-laptop --battery --plot day.html
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidegate.cli.plots import check_plot
from tidegate.cli.progress import progress_bars
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidegate.edge.energy.simulate.compare import Row, Scene

_POLICIES = "pace,local,edf,race,powersave,cloud,overflow"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--trace", default="conv", help="conv, code, home, sensor, or a CSV like Azure's"
    )
    parser.add_argument(
        "--kind", help="of requests that a CSV holds: decides deadlines (default conv)"
    )
    parser.add_argument("--profile", required=True, help="board, see `tidegate profile list`")
    parser.add_argument(
        "--policy",
        default=_POLICIES,
        help="comma-separated; also battery, bound, pace-no-knee, pace-no-hold, pace-no-idle,"
        f" pace-no-heat, pace-no-debt, pace-no-offload (default {_POLICIES})",
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each policy (default 5)")
    parser.add_argument("--requests", type=int, default=500, help="of a run (default 500)")
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.5,
        help="share of the time that the requests would fill one at a time (default 0.5)",
    )
    parser.add_argument(
        "--as-recorded",
        action="store_true",
        help="keep the trace's own times (a home's day is a day) instead of --utilisation",
    )
    parser.add_argument(
        "--radio", choices=("ethernet", "wifi", "lte"), default="wifi", help="(default wifi)"
    )
    parser.add_argument("--no-cloud", action="store_true", help="nothing can leave the device")
    parser.add_argument(
        "--price",
        type=float,
        help="joules that its owner counts a token of the cloud as (default 1)",
    )
    parser.add_argument(
        "--battery", action="store_true", help="the board lives on its battery for the whole run"
    )
    parser.add_argument(
        "--watts",
        type=float,
        default=1.0,
        help="true power above idle over the believed (default 1)",
    )
    parser.add_argument(
        "--clairvoyant", action="store_true", help="policies know how long answers will be"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.html", help="write a page of plots")


def run(args: argparse.Namespace) -> int:
    """Simulate and print."""
    from tidegate.edge.energy.simulate.compare import rows_of, run_cells

    check_plot(args.plot)
    if args.seeds < 1:
        raise ConfigError("seeds", args.seeds, "at least 1")
    scene = _scene(args)
    names = list(dict.fromkeys(args.policy.split(",")))
    with progress_bars(quiet=args.json) as report:
        cells = run_cells(scene, names, range(1, args.seeds + 1), report)
    rows = rows_of(cells)
    if args.plot is not None:
        from tidegate.cli.simulate_plots import write_page

        write_page(args.plot, scene, cells)
    if args.json:
        print(json.dumps({"scene": _told(scene), "rows": [_clean(asdict(one)) for one in rows]}))
    else:
        print(_table(scene, rows))
    return 0


def _scene(args: argparse.Namespace) -> Scene:
    from tidegate.edge.energy.profile_files import CALIBRATION, OVERLAYS, read_library
    from tidegate.edge.energy.simulate.boards import ASSUMED, GPU_CLOUD, RADIOS, costs_of
    from tidegate.edge.energy.simulate.compare import Scene
    from tidegate.edge.energy.simulate.families import FAMILIES, MIXES
    from tidegate.edge.energy.simulate.jobs import read_trace

    profile = read_library(OVERLAYS, CALIBRATION).profile(args.profile)
    if profile.id not in ASSUMED:
        raise ConfigError("profile", profile.id, f"one of {', '.join(ASSUMED)} to be simulated")
    assumed = ASSUMED[profile.id]
    if args.battery and not assumed.battery_j:
        raise ConfigError("battery", profile.id, "a board that has one: ryzen-laptop")
    rows, kind = None, args.trace
    if args.trace not in FAMILIES:
        rows, kind = read_trace(Path(args.trace)), args.kind or "conv"
    if kind not in MIXES:
        raise ConfigError("kind", kind, f"one of {', '.join(MIXES)}")
    cloud = None if args.no_cloud else GPU_CLOUD
    if cloud is not None and args.price is not None:
        cloud = replace(cloud, token_price=args.price)
    return Scene(
        costs=costs_of(profile, assumed),
        assumed=assumed,
        radio=RADIOS[args.radio],
        cloud=cloud,
        kind=kind,
        requests=args.requests,
        utilisation=None if args.as_recorded else args.utilisation,
        rows=rows,
        true_watts=args.watts,
        on_battery=args.battery,
        clairvoyant=args.clairvoyant,
    )


def _told(scene: Scene) -> dict[str, Any]:
    """The scene for a result: costs, assumptions with their reasons, no rows of a trace."""
    told: dict[str, Any] = _clean(asdict(replace(scene, rows=None)))
    return told


def _clean(value: Any) -> Any:
    """What JSON can say: it has no infinity."""
    if isinstance(value, dict):
        return {key: _clean(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _table(scene: Scene, rows: Sequence[Row]) -> str:
    head = (
        f"{scene.kind}, {scene.requests} requests {scene.pace_told}, watts of"
        f" the {scene.costs.scope}, {scene.costs.source}\nassumed: {scene.assumed.why}"
    )
    titles = (
        "policy",
        "J/req",
        "system",
        "price",
        "missed",
        "cloud",
        "soft s",
        "modes/h",
        "x pace",
    )
    lines = [head, f"{titles[0]:<16}" + "".join(f"{title:>9}" for title in titles[1:])]
    for row in rows:
        against = row.cost_over_pace
        values = [
            f"{row.device_j:9.1f}" if math.isfinite(row.device_j) else f"{'-':>9}",
            f"{row.system_j:9.1f}",
            f"{row.price:9.1f}",
            f"{row.missed_share:9.2%}",
            f"{row.offloaded_share:9.1%}",
            f"{row.soft_s:9.0f}",
            f"{row.switches_per_h:9.1f}",
            f"{'':>9}" if against is None else f"{against.ratio:9.2f}",
        ]
        note = "" if against is None else f"  [{against.low:.2f}, {against.high:.2f}]"
        if row.lasted_share is not None:
            note += f"  battery lasted on {row.lasted_share:.0%}"
        lines.append(f"{row.policy:<16}" + "".join(values) + note)
    lines.append("J/req: of the device above idling; x pace: system joules and price over PACE's")
    return "\n".join(lines)
