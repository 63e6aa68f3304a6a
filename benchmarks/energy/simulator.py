"""How fast the simulator is, and one decision of PACE: processor time on one core.

What PACE saves and misses is measured by `grid.py` beside this file, what it leaves by `regret.py`.

    python benchmarks/energy/simulator.py --keep benchmarks/results/energy-speed.json
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from pathlib import Path

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
from tidegate.edge.energy.simulate.compare import Scene  # noqa: E402
from tidegate.edge.energy.simulate.families import DAY_S, FAMILIES, jobs_of  # noqa: E402
from tidegate.edge.energy.simulate.policies import policies  # noqa: E402
from tidegate.edge.energy.simulate.run import simulate  # noqa: E402

POLICIES = ("pace", "local", "edf", "race", "powersave", "cloud", "overflow")
BOARD = "jetson-orin-nano-8gb-super"
REQUESTS = 10_000
STATES = 2000
REPEATS = 5


def the_scene() -> Scene:
    """A board with Wi-Fi and the cloud."""
    profile = read_library(OVERLAYS, CALIBRATION).profile(BOARD)
    return Scene(
        costs=costs_of(profile, ASSUMED[BOARD]),
        assumed=ASSUMED[BOARD],
        radio=WIFI,
        cloud=GPU_CLOUD,
        kind="conv",
        requests=REQUESTS,
        utilisation=0.5,
    )


def speed() -> dict[str, float]:
    """Processor seconds of a simulated day of 10 000 requests, the least of three."""
    scene = the_scene()
    costs, mode = scene.costs, scene.default_mode
    arrivals = FAMILIES["conv"](REQUESTS, 1)
    stretch = DAY_S / (arrivals[-1].at_s - arrivals[0].at_s)
    jobs = jobs_of(
        arrivals, "conv", 1, stretch=stretch, alone_s=lambda p, o: costs.request_s(mode, p, o)
    )
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


def latency() -> dict[str, float]:
    """Microseconds of a decision with 64 requests in line and every row taken.

    Each state is decided a few times: `p99` is over the medians of states, which another process on
    the core does not move; `p99_of_all` over every single decision, which it does.
    """
    scene = the_scene()
    pace = Pace(costs=scene.costs, radio=WIFI, cloud=GPU_CLOUD)
    chance = random.Random(1)
    medians, singles = list[float](), list[float]()
    for _ in range(STATES):
        state, took = _crowd(chance, scene.costs.rows), list[float]()
        for _ in range(REPEATS):
            started = time.thread_time_ns()
            pace.decide(state)
            took.append((time.thread_time_ns() - started) / 1000)
        medians.append(statistics.median(took))
        singles += took
    found = {
        "p50_us": statistics.median(singles),
        "p99_us": _p99(medians),
        "p99_of_all_us": _p99(singles),
    }
    print(f"a decision with 64 in line: {found}", flush=True)
    return found


def _p99(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


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
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    results = {"day_s": speed(), "decision": latency()}
    if args.keep is not None:
        text = report("energy/simulator.py", ("numpy", "scipy"), results)
        args.keep.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
