"""PACE on every board, family and load, in good worlds and bad: the bars of energy, by one command.

Each scene runs every policy on the same requests of every seed. Worlds: with the cloud; without
one; over LTE with the network gone a fifth of the time; watts that are 0.7 and 1.3 times what the
policies believe; a battery that has to last; surroundings of 50 degrees. A scene that is done is
kept at once, so that a run which was stopped goes on where it was; `--tell` judges what is kept.

    nice -n 15 python benchmarks/energy/grid.py --traces ../shared/traces \
        --resume benchmarks/results/energy-grid.json
    python benchmarks/energy/grid.py --tell --resume benchmarks/results/energy-grid.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Final

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))
from grid_verdicts import verdicts  # noqa: E402
from report import report  # noqa: E402

from tidegate.edge.energy.profile_files import CALIBRATION, OVERLAYS, read_library  # noqa: E402
from tidegate.edge.energy.simulate.boards import (  # noqa: E402
    ASSUMED,
    GPU_CLOUD,
    LTE,
    WIFI,
    costs_of,
)
from tidegate.edge.energy.simulate.compare import (  # noqa: E402
    Cell,
    Scene,
    missed_more,
    paired,
    rows_of,
    run_cells,
)
from tidegate.edge.energy.simulate.jobs import Arrival, read_trace  # noqa: E402
from tidegate.errors import ConfigError  # noqa: E402

LOCAL: Final = ("pace", "local", "edf", "race", "powersave")
ALL: Final = (*LOCAL, "cloud", "overflow")
PARTS: Final = ("pace-no-knee", "pace-no-hold", "pace-no-idle", "pace-no-offload")
KINDS: Final = ("conv", "code", "home", "sensor")
LOADS: Final = (0.2, 0.5, 0.8, 1.1)
BUDGETS: Final = (0.35, 0.7)
"""Of the joules of work that answering all on the device would take, that the battery has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """One scene of the grid, and who runs in it."""

    world: str
    board: str
    kind: str
    load: float
    policies: Sequence[str]
    watts: float = 1.0
    budget: float = 0.0

    @property
    def name(self) -> str:
        """Unique, and what `--resume` goes by."""
        return (
            f"{self.world} {self.board} {self.kind} {self.load:g} x{self.watts:g} {self.budget:g}"
        )


def spots() -> Iterator[Spot]:
    """All scenes, those that the bars are about first."""
    for board in ASSUMED:
        for kind in KINDS:
            for load in LOADS:
                at: dict[str, Any] = {"board": board, "kind": kind, "load": load}
                yield Spot(world="cloud", policies=(*ALL, *PARTS) if load == 0.5 else ALL, **at)
                yield Spot(world="alone", policies=LOCAL, **at)
    for board in ASSUMED:
        for kind in KINDS:
            at = {"board": board, "kind": kind, "load": 0.5}
            for watts in (0.7, 1.3):
                yield Spot(world="cloud", policies=("pace", "edf", "overflow"), watts=watts, **at)
    for board in ASSUMED:
        for kind in ("conv", "home"):
            at = {"board": board, "kind": kind, "load": 0.5}
            yield Spot(world="lte", policies=("pace", "edf", "cloud", "overflow"), **at)
            hot = ("pace", "edf", "race", "pace-no-heat")
            yield Spot(world="hot", policies=hot, **{**at, "load": 1.1})
    for kind in ("conv", "home", "sensor"):
        for budget in BUDGETS:
            names = (*ALL, "battery", "pace-no-debt")
            at = {"board": "ryzen-laptop", "kind": kind, "load": 0.5}
            yield Spot(world="battery", policies=names, budget=budget, **at)


def scene_of(spot: Spot, rows: Sequence[Arrival] | None, requests: int) -> Scene:
    """What `spot` says."""
    profile = read_library(OVERLAYS, CALIBRATION).profile(spot.board)
    assumed = ASSUMED[spot.board]
    scene = Scene(
        costs=costs_of(profile, assumed),
        assumed=assumed,
        radio=WIFI,
        cloud=GPU_CLOUD,
        kind=spot.kind,
        requests=requests,
        utilisation=spot.load,
        rows=rows,
        true_watts=spot.watts,
    )
    if spot.world == "alone":
        return replace(scene, cloud=None)
    if spot.world == "lte":
        return replace(scene, radio=LTE, offline_share=0.2)
    if spot.world == "hot":
        return replace(scene, cloud=None, assumed=replace(assumed, ambient_c=50.0))
    if spot.world == "battery":
        return replace(scene, on_battery=True)
    return scene


def cells_of(spot: Spot, scene: Scene, seeds: Sequence[int]) -> list[Cell]:
    """Every policy on every seed; a battery is sized for each seed's requests."""
    if not spot.budget:
        return run_cells(scene, spot.policies, seeds)
    cells = list[Cell]()
    for seed in seeds:
        jobs, costs, mode = scene.jobs(seed), scene.costs, scene.default_mode
        work_j = sum(costs.request_j(mode, job.prompt_tokens, job.output_tokens) for job in jobs)
        battery_j = costs.idle_w * jobs[-1].arrives_s + spot.budget * work_j
        assumed = replace(scene.assumed, battery_j=battery_j)
        cells += run_cells(replace(scene, assumed=assumed), spot.policies, [seed])
    return cells


def told(spot: Spot, cells: Sequence[Cell]) -> dict[str, Any]:
    """A scene's result: means, and PACE beside each other policy with intervals."""
    against = {}
    for other in spot.policies:
        if other == "pace":
            continue
        against[other] = {
            "cost": asdict(paired(cells, "pace", other, lambda cell: cell.cost)),
            "device_j": asdict(paired(cells, "pace", other, lambda cell: cell.device_j)),
            "missed_more": asdict(missed_more(cells, "pace", other)),
        }
    rows = [
        {key: value for key, value in asdict(row).items() if key != "cost_over_pace"}
        for row in rows_of(cells)
    ]
    found: dict[str, Any] = {**asdict(spot), "rows": rows, "pace_over": against}
    if spot.budget:
        found["lasted"] = {
            name: [cell.battery_hours is None for cell in cells if cell.policy == name]
            for name in spot.policies
        }
    found["served_hours"] = fmean(cell.hours for cell in cells)
    return found


def clean(value: Any) -> Any:
    """What JSON can say."""
    if isinstance(value, dict):
        return {key: clean(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [clean(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def kept(path: Path, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Scenes of an earlier run, which must have had the same `settings`; None: any.

    Raises:
        ConfigError: it had others.
    """
    if not path.exists():
        return {}
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    if settings is not None and results["settings"] != settings:
        allowed = f"those of what {path.name} has, {results['settings']}, or --resume another file"
        raise ConfigError("settings", dict(settings), allowed)
    scenes: dict[str, Any] = results["scenes"]
    return scenes


def keep(path: Path, scenes: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write all that is there, whole or not at all."""
    results = {"settings": settings, "verdicts": verdicts(scenes), "scenes": scenes}
    beside = path.with_suffix(".part")
    text = report("energy/grid.py", ("numpy", "scipy"), clean(results))
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


def main() -> int:
    """Run what is missing, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--traces", type=Path, help="folder of the Azure traces; else drawn")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--worlds", nargs="+", help="only these")
    parser.add_argument(
        "--resume", type=Path, required=True, help="JSON of results, kept up to date"
    )
    parser.add_argument("--tell", action="store_true", help="only judge what is kept")
    args = parser.parse_args()
    settings = {
        "seeds": args.seeds,
        "requests": args.requests,
        "traces": args.traces is not None,
    }
    try:
        scenes = kept(args.resume, None if args.tell else settings)
    except ConfigError as error:
        parser.error(str(error))
    if not args.tell:
        rows: dict[str, Sequence[Arrival]] = {}
        if args.traces is not None:
            for kind in ("conv", "code"):
                rows[kind] = read_trace(args.traces / f"azure_{kind}.csv")
        began_s = time.process_time()
        for spot in spots():
            if spot.name in scenes or (args.worlds and spot.world not in args.worlds):
                continue
            scene = scene_of(spot, rows.get(spot.kind), args.requests)
            cells = cells_of(spot, scene, range(1, args.seeds + 1))
            scenes[spot.name] = told(spot, cells)
            keep(args.resume, scenes, settings)
            print(f"{time.process_time() - began_s:7.1f} s  {spot.name}", flush=True)
    print(json.dumps(clean(verdicts(scenes)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
