"""Threads held back while a model stays loaded, beside one that was opened with fewer.

Steps of all ways take turns. Wall time on a machine that does other work says little; processor
time, and how much of it the busiest thread did, say whether a thread was held back and what that
costs.

    python benchmarks/edge/thread_limit.py BUNDLE --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tidegate.edge.energy.own_modes import LiveThreads
from tidegate.edge.executors.choice import ExecutorSettings, open_executor
from tidegate.engine.executor import Executor, ExecutorStep, Row
from tidegate.model.bundle import Bundle

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
CONTEXT_TOKENS, ROWS = 512, 4
BLOCKS = CONTEXT_TOKENS // 32
CASES = {"decode, 1 row": (1, 1, 200), "decode, 4 rows": (4, 1, 200), "prefill of 128": (1, 128, 0)}
"""Rows, tokens of each, tokens before."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """Medians of one step with threads limited in one way."""

    way: str
    step: str
    wall_ms: float
    processor_ms: float
    busiest_share: float
    """Of the processor time, that of the busiest thread: 1 when it was alone."""


def step_of(rows: int, tokens: int, past: int) -> ExecutorStep:
    """Arbitrary tokens, each row in blocks of its own."""
    blocks = np.arange(BLOCKS, dtype=np.int32)
    ids = np.arange(5, 5 + tokens, dtype=np.int64)
    made = (Row(tokens=ids, past=past, blocks=blocks + place * BLOCKS) for place in range(rows))
    return ExecutorStep(rows=tuple(made))


def thread_seconds() -> dict[str, float]:
    """Processor seconds of every thread."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        found[task.name] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return found


def measured(work: Callable[[], object]) -> tuple[float, float, float]:
    """Wall and processor milliseconds of some work, and the busiest thread's share."""
    before, began_s = thread_seconds(), time.perf_counter()
    work()
    wall_s = time.perf_counter() - began_s
    spent = [now - before.get(name, 0.0) for name, now in thread_seconds().items()]
    return 1e3 * wall_s, 1e3 * sum(spent), max(spent) / sum(spent)


def opened(bundle: Bundle, threads: int) -> Executor:
    """On OpenVINO with the native layer, which holds threads back."""
    settings = ExecutorSettings(
        choice="openvino", context_tokens=CONTEXT_TOKENS, rows=ROWS, threads=threads, native="on"
    )
    return open_executor(bundle, settings)


def anonymous_mb() -> float:
    """Memory of the process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("RssAnon"))
    return int(kib) * 1024 / 1e6


def ways(bundle: Bundle, threads: int, repeats: int) -> tuple[list[Way], dict[str, float]]:
    """Every way on every step; and what a switch takes, the first time and later."""
    limited, fixed = opened(bundle, threads), opened(bundle, 1)
    assert isinstance(limited, LiveThreads)
    before_mb = anonymous_mb()
    first = measured(lambda: limited.limit_threads(1))
    costs = {
        "first_switch_processor_ms": round(first[1], 1),
        "first_switch_mb": round(anonymous_mb() - before_mb, 1),
    }
    tried: dict[str, tuple[Executor, int]] = {
        f"{threads} threads": (limited, threads),
        f"1 of {threads} threads": (limited, 1),
        "opened with 1": (fixed, threads),
    }
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    switches = []
    for repeat in range(repeats + 1):
        for way, (executor, limit) in tried.items():
            began_s = time.perf_counter()
            limited.limit_threads(limit)
            switches.append(time.perf_counter() - began_s)
            for name, case in CASES.items():
                step = step_of(*case)
                executor.execute(step)  # within which a thread that is too many goes
                one = measured(lambda executor=executor, step=step: executor.execute(step))
                if repeat:
                    found.setdefault((way, name), []).append(one)
    rows = []
    for (way, name), samples in found.items():
        wall, processor, share = (
            statistics.median(column) for column in zip(*samples, strict=True)
        )
        rows.append(
            Way(
                way=way,
                step=name,
                wall_ms=round(wall, 1),
                processor_ms=round(processor, 1),
                busiest_share=round(share, 3),
            )
        )
    return rows, costs | {"switch_us": round(1e6 * statistics.median(switches), 1)}


def idle_ms_per_s() -> float:
    """Processor milliseconds of a second in which nothing is asked for."""
    time.sleep(0.5)
    before = time.process_time()
    time.sleep(2.0)
    return round(1e3 * (time.process_time() - before) / 2, 2)


def main() -> int:
    """Print a table, or JSON with the command, versions and hardware."""
    from report import report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows, costs = ways(Bundle.open(args.bundle, every_target=False), args.threads, args.repeats)
    costs["idle_ms_per_s"] = idle_ms_per_s()
    if args.json:
        steps = [asdict(one) for one in rows]
        print(report("edge/thread_limit.py", ("openvino", "numpy"), {"steps": steps, **costs}))
        return 0
    for one in rows:
        figures = f"{one.wall_ms:>8.1f} ms {one.processor_ms:>8.1f} ms of processors"
        print(f"{one.way:<16} {one.step:<16} {figures}, busiest thread {one.busiest_share:.1%}")
    print(json.dumps(costs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
