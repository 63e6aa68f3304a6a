"""What lies between PACE and the bound: a bound that is loose, or what nobody can know.

Costs are exact here (policies believe the true watts) and the network is there. Of each scene:

* `pace`, `told`: PACE over the linear programme, as it is and when it is told answers' lengths.
* `foreseen`: the best schedule found by moving single requests of `told` to later begins and other
  routes with all arrivals known. It can really be run, so the optimum lies between 1 and this, and
  what `told` lies above it nobody could save who does not know arrivals.
* `parts`: where the joules of `pace` go, as shares of the bound.

    python benchmarks/energy/regret.py --keep benchmarks/results/energy-bounds.json
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from report import report  # noqa: E402

from tidegate.edge.energy.pace import Pace  # noqa: E402
from tidegate.edge.energy.pace_state import Decision, PaceState  # noqa: E402
from tidegate.edge.energy.profile_files import CALIBRATION, OVERLAYS, read_library  # noqa: E402
from tidegate.edge.energy.simulate.boards import (  # noqa: E402
    ASSUMED,
    GPU_CLOUD,
    WIFI,
    costs_of,
)
from tidegate.edge.energy.simulate.bound import lower_bound  # noqa: E402
from tidegate.edge.energy.simulate.compare import Scene  # noqa: E402
from tidegate.edge.energy.simulate.jobs import Job  # noqa: E402
from tidegate.edge.energy.simulate.run import Outcome, Policy, Setup, simulate  # noqa: E402

_LATE_J: Final = 1e6
"""Of a miss in the search: none is taken for joules."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What foresight settles of one request."""

    begins_s: float = 0.0
    may_leave: bool = True
    may_stay: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Foresight:
    """A policy that sees requests when and as `choices` say."""

    policy: Policy
    choices: Mapping[str, Choice]

    def decide(self, state: PaceState) -> Decision:
        """See `Policy`."""
        waiting, next_s = [], float("inf")
        for one in state.waiting:
            choice = self.choices[one.id]
            if choice.begins_s > state.now_s + 1e-9:
                next_s = min(next_s, choice.begins_s)
                continue
            leaves = one.may_leave and choice.may_leave
            stays = choice.may_stay or not one.may_leave
            waiting.append(replace(one, may_leave=leaves, may_stay=stays, may_wait=False))
        decision = self.policy.decide(replace(state, waiting=waiting))
        return replace(decision, wake_s=min(decision.wake_s, next_s))


def foreseen(jobs: Sequence[Job], setup: Setup, pace: Pace, seed: int, sweeps: int) -> Outcome:
    """The best of single changes to clairvoyant PACE's schedule, over and over."""
    choices = {job.id: Choice() for job in jobs}
    best = simulate(jobs, setup, pace)
    least, chance = _score(best), random.Random(seed)
    for _ in range(sweeps):
        order = list(range(len(jobs)))
        chance.shuffle(order)
        for place in order:
            job = jobs[place]
            for choice in _choices(jobs, place):
                tried = {**choices, job.id: choice}
                outcome = simulate(jobs, setup, Foresight(policy=pace, choices=tried))
                if _score(outcome) < least:
                    best, least, choices = outcome, _score(outcome), tried
    return best


def _choices(jobs: Sequence[Job], place: int) -> list[Choice]:
    """Beginning with one of the next three, or now; and the route left open or settled."""
    job = jobs[place]
    later = [one.arrives_s for one in jobs[place + 1 : place + 4] if one.arrives_s < job.deadline_s]
    found = [Choice(begins_s=at_s) for at_s in (0.0, *later)]
    if not job.private:
        found += [Choice(begins_s=at_s, may_leave=False) for at_s in (0.0, *later)]
        found.append(Choice(may_stay=False))
    return found


def _score(outcome: Outcome) -> float:
    return outcome.meter.system_j + outcome.meter.price + _LATE_J * outcome.missed


def _bound_j(jobs: Sequence[Job], scene: Scene, outcome: Outcome, *, whole: bool = False) -> float:
    ended = {one.job.id: one.at_s for one in outcome.ended}
    until = [max(job.deadline_s, ended[job.id]) for job in jobs]
    found = lower_bound(
        jobs, scene.costs, radio=scene.radio, cloud=scene.cloud, until_s=until, whole=whole
    )
    return found.joules


def regret(board: str, rows: int, load: float, args: argparse.Namespace) -> dict[str, Any]:
    """One scene over all seeds: ratios of sums."""
    profile, assumed = read_library(OVERLAYS, CALIBRATION).profile(board), ASSUMED[board]
    scene = Scene(
        costs=replace(costs_of(profile, assumed), rows=rows),
        assumed=assumed,
        radio=WIFI,
        cloud=GPU_CLOUD,
        kind="conv",
        requests=args.requests,
        utilisation=load,
    )
    pace = Pace(costs=scene.costs, radio=WIFI, cloud=GPU_CLOUD)
    sums = dict.fromkeys(("pace", "pace_bound", "told", "foreseen", "bound"), 0.0)
    parts = dict.fromkeys(("work", "parked", "switch", "radio", "cloud", "price"), 0.0)
    late = dict.fromkeys(("pace", "told", "foreseen"), 0)
    for seed in range(1, args.seeds + 1):
        jobs = scene.jobs(seed)
        setup = scene.setup(jobs)
        exact = replace(setup, clairvoyant=True)
        ours, told = simulate(jobs, setup, pace), simulate(jobs, exact, pace)
        best = foreseen(jobs, exact, pace, seed, args.sweeps)
        sums["pace_bound"] += _bound_j(jobs, scene, ours)
        sums["bound"] += _bound_j(jobs, scene, told)
        for name, outcome in (("pace", ours), ("told", told), ("foreseen", best)):
            sums[name] += outcome.meter.system_j + outcome.meter.price
            late[name] += outcome.missed
        meter = ours.meter
        for name in ("work", "parked", "switch", "radio", "cloud"):
            parts[name] += getattr(meter, f"{name}_j")
        parts["price"] += meter.price
    bound, ours_bound = sums["bound"], sums["pace_bound"]
    return {
        "board": board,
        "rows": rows,
        "load": load,
        "pace": round(sums["pace"] / ours_bound, 3),
        "told": round(sums["told"] / bound, 3),
        "foreseen": round(sums["foreseen"] / bound, 3),
        "parts": {name: round(joules / ours_bound, 3) for name, joules in parts.items()},
        "late": late,
    }


def looseness(count: int) -> dict[str, float]:
    """The exact programme over the linear one, on small instances of one row."""
    ratios = []
    profile = read_library(OVERLAYS, CALIBRATION)
    for number in range(count):
        board = list(ASSUMED)[number % len(ASSUMED)]
        costs = replace(costs_of(profile.profile(board), ASSUMED[board]), rows=1)
        scene = Scene(
            costs=costs,
            assumed=ASSUMED[board],
            radio=WIFI,
            cloud=GPU_CLOUD,
            kind="conv",
            requests=8,
            utilisation=0.5,
        )
        jobs = scene.jobs(number)
        exact = replace(scene.setup(jobs), clairvoyant=True)
        told = simulate(jobs, exact, Pace(costs=costs, radio=WIFI, cloud=GPU_CLOUD))
        parts = _bound_j(jobs, scene, told)
        ratios.append(_bound_j(jobs, scene, told, whole=True) / parts)
    return {"instances": count, "median": statistics.median(ratios), "most": max(ratios)}


def main() -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--boards", nargs="+", choices=list(ASSUMED), default=list(ASSUMED))
    parser.add_argument("--loads", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--sweeps", type=int, default=2)
    parser.add_argument("--instances", type=int, default=40, help="of the exact programme")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    found = []
    for board in args.boards:
        for rows in (1, ASSUMED[board].rows):
            for load in args.loads:
                found.append(regret(board, rows, load, args))
                print(found[-1], flush=True)
    loose = looseness(args.instances)
    print({"exact over linear": loose}, flush=True)
    if args.keep is not None:
        results = {"regret": found, "exact_over_linear": loose}
        text = report("energy/regret.py", ("numpy", "scipy"), results)
        args.keep.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
