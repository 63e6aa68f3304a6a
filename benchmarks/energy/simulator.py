"""PACE against what people run today, on simulated boards: joules, misses, and the bound.

Every policy answers the same requests of every seed. With `--traces FOLDER` the chat and code
requests are stretches of the Azure traces (rows that a device serves), else they are drawn from
their quantiles. `--speed` times a simulated day, `--latency` one decision with 64 requests in line.

    python benchmarks/energy/simulator.py --traces ../shared/traces --seeds 20 \
        --keep benchmarks/results/energy-simulator.json
    python benchmarks/energy/simulator.py --speed --latency \
        --keep benchmarks/results/energy-speed.json
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from report import report  # noqa: E402

from tidegate.edge.energy.pace import Pace  # noqa: E402
from tidegate.edge.energy.pace_state import PaceState, Running, Waiting  # noqa: E402
from tidegate.edge.energy.profile_files import CALIBRATION, OVERLAYS, read_library  # noqa: E402
from tidegate.edge.energy.simulate.boards import (  # noqa: E402
    ASSUMED,
    GPU_CLOUD,
    WIFI,
    costs_of,
)
from tidegate.edge.energy.simulate.compare import Row, Scene, rows_of, run_cells  # noqa: E402
from tidegate.edge.energy.simulate.families import DAY_S, jobs_of  # noqa: E402
from tidegate.edge.energy.simulate.jobs import Arrival, read_trace  # noqa: E402
from tidegate.edge.energy.simulate.run import simulate  # noqa: E402

POLICIES = ("pace", "local", "edf", "race", "powersave", "cloud", "overflow")
PARTS = ("pace-no-knee", "pace-no-hold", "pace-no-idle", "pace-no-offload")


def scene_of(board: str, kind: str, args: argparse.Namespace, rows: Any = None) -> Scene:
    """A board with Wi-Fi and the cloud."""
    profile = read_library(OVERLAYS, CALIBRATION).profile(board)
    return Scene(
        costs=costs_of(profile, ASSUMED[board]),
        assumed=ASSUMED[board],
        radio=WIFI,
        cloud=GPU_CLOUD,
        kind=kind,
        requests=args.requests,
        utilisation=0.5,
        rows=rows,
        on_battery=board == "ryzen-laptop" and args.battery,
    )


def traces(folder: Path | None) -> dict[str, Sequence[Arrival]]:
    """Rows of the public traces by kind, where there are any."""
    if folder is None:
        return {}
    return {kind: read_trace(folder / f"azure_{kind}.csv") for kind in ("conv", "code")}


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Boards, families and loads, each with every policy."""
    rows, found = traces(args.traces), []
    for board in args.boards:
        for kind in args.families:
            for utilisation in args.utilisations:
                scene = replace(
                    scene_of(board, kind, args, rows.get(kind)), utilisation=utilisation
                )
                for watts in args.watts:
                    cells = run_cells(
                        replace(scene, true_watts=watts),
                        (*POLICIES, *PARTS) if watts == 1.0 else POLICIES,
                        range(1, args.seeds + 1),
                    )
                    table = rows_of(cells)
                    told = {"board": board, "kind": kind, "utilisation": utilisation}
                    found.append({**told, "watts": watts, "rows": [asdict(one) for one in table]})
                    print(line(board, kind, utilisation, watts, table), flush=True)
    return found


def line(board: str, kind: str, utilisation: float, watts: float, rows: Sequence[Row]) -> str:
    """One scene in one line: what others cost over PACE, and who is late."""
    parts = []
    for row in rows:
        against = row.cost_over_pace
        ratio = "" if against is None else f" {against.ratio:.2f}x"
        parts.append(f"{row.policy}{ratio} ({row.missed_share:.1%} late)")
    return f"{board} {kind} {utilisation:g} watts x{watts:g}: " + ", ".join(parts)


def bounds(args: argparse.Namespace) -> list[dict[str, Any]]:
    """PACE over the bound, as it is and when it knows lengths, on small runs."""
    found = []
    for board in args.boards:
        for clairvoyant in (False, True):
            for rows in (1, ASSUMED[board].rows):
                scene = scene_of(board, "conv", args)
                scene = replace(
                    scene,
                    requests=args.bound_requests,
                    clairvoyant=clairvoyant,
                    costs=replace(scene.costs, rows=rows),
                    utilisation=0.2,
                )
                table = rows_of(run_cells(scene, ("pace", "bound"), range(1, args.bound_seeds + 1)))
                pace, bound = table
                ratio = (pace.system_j + pace.price) / bound.system_j
                told = {"board": board, "clairvoyant": clairvoyant, "rows": rows}
                found.append({**told, "pace_over_bound": ratio, "late": pace.missed_share})
                print({**told, "over bound": round(ratio, 3)}, flush=True)
    return found


def speed(args: argparse.Namespace) -> dict[str, float]:
    """Processor seconds of a simulated day of 10 000 requests, the least of three."""
    scene = scene_of("jetson-orin-nano-8gb-super", "conv", args)
    from tidegate.edge.energy.simulate.compare import policies

    arrivals = replace(scene, requests=10_000)._arrivals(1)
    stretch = DAY_S / (arrivals[-1].at_s - arrivals[0].at_s)
    jobs = jobs_of(arrivals, "conv", 1, stretch=stretch, alone_s=scene._alone_s)
    known = policies(scene.costs, default_mode=scene.default_mode, radio=WIFI, cloud=GPU_CLOUD)
    found = {}
    for name in POLICIES:
        took = []
        for _ in range(3):
            started = time.process_time()
            simulate(jobs, scene.setup(jobs), known[name])
            took.append(time.process_time() - started)
        found[name] = min(took)
        print(f"a day of 10 000 requests, {name}: {min(took):.2f} s of processor time", flush=True)
    return found


def latency(args: argparse.Namespace) -> dict[str, float]:
    """Microseconds of a decision with 64 requests in line and every row taken."""
    scene = scene_of("jetson-orin-nano-8gb-super", "conv", args)
    pace = Pace(costs=scene.costs, radio=WIFI, cloud=GPU_CLOUD)
    chance = random.Random(1)
    took = []
    for _ in range(5000):
        state = _crowd(chance, scene.costs.rows)
        started = time.thread_time_ns()
        pace.decide(state)
        took.append((time.thread_time_ns() - started) / 1000)
    took.sort()
    found = {"p50_us": statistics.median(took), "p99_us": took[math.ceil(0.99 * len(took)) - 1]}
    print(f"a decision with 64 in line: {found}", flush=True)
    return found


def _crowd(chance: random.Random, rows: int) -> PaceState:
    waiting = [
        Waiting(
            id=str(number),
            prompt_tokens=chance.randint(50, 2000),
            output_mean=150.0,
            output_p90=400.0,
            output_most=512.0,
            arrived_s=100.0 - chance.random() * 20,
            deadline_s=100.0 + chance.uniform(1, 400),
            may_leave=chance.random() < 0.7,
            may_wait=chance.random() < 0.2,
        )
        for number in range(64)
    ]
    running = [
        Running(
            prefill_tokens=0.0,
            output_mean=80.0,
            output_p90=200.0,
            output_most=400.0,
            context_tokens=800.0,
            deadline_s=100.0 + chance.uniform(5, 40),
        )
        for _ in range(rows)
    ]
    return PaceState(now_s=100.0, mode=1, mode_since_s=50.0, waiting=waiting, running=running)


def main() -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--boards", nargs="+", choices=list(ASSUMED), default=list(ASSUMED))
    parser.add_argument("--families", nargs="+", default=["conv", "code", "home", "sensor"])
    parser.add_argument("--utilisations", type=float, nargs="+", default=[0.2, 0.5, 0.8, 1.1])
    parser.add_argument("--watts", type=float, nargs="+", default=[1.0])
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--bound-requests", type=int, default=60)
    parser.add_argument("--bound-seeds", type=int, default=5)
    parser.add_argument("--bounds", action="store_true", help="only PACE over the bound")
    parser.add_argument("--battery", action="store_true", help="the laptop lives on its battery")
    parser.add_argument("--speed", action="store_true", help="only how fast a day is simulated")
    parser.add_argument("--latency", action="store_true", help="only how long a decision takes")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    if args.speed:
        results["day_s"] = speed(args)
    if args.latency:
        results["decision"] = latency(args)
    if args.bounds:
        results["bounds"] = bounds(args)
    if not results:
        results["scenes"] = compare(args)
    results["settings"] = json.loads(json.dumps(vars(args), default=str))
    if args.keep is not None:
        text = report("energy/simulator.py", ("numpy", "scipy"), results)
        args.keep.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
