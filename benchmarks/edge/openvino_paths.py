"""One bundle on OpenVINO, its products by the native layer and by the library: steps and start.

Steps of both take turns and are measured in processor time of the whole process, with one thread:
on a machine that does other work this says more about a path than the clock does. What a start
costs, and the memory it leaves, is measured in a process for each path, the files warm.

    python benchmarks/edge/openvino_paths.py BUNDLE --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tidegate.edge.executors.choice import ExecutorSettings, open_executor
from tidegate.edge.executors.native import Native
from tidegate.engine.executor import Executor, ExecutorStep, Row
from tidegate.model.bundle import Bundle

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
CONTEXT_TOKENS, ROWS = 1024, 8
BLOCKS = CONTEXT_TOKENS // 32
CASES = {
    "1 row": (1, 1, 140),
    "2 rows": (2, 1, 140),
    "4 rows": (4, 1, 140),
    "8 rows": (8, 1, 140),
    "1 row after 900 tokens": (1, 1, 900),
    "prefill of 128": (1, 128, 0),
}
"""Rows, tokens of each, tokens before."""
IN_A_ROW = 5
PATHS: tuple[Native, ...] = ("on", "off")


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Processor milliseconds of one step, medians; the ratio says how much faster native is."""

    step: str
    native_ms: float
    library_ms: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Start:
    """From no process to a warmed-up executor; memory is that of the process then."""

    path: str
    cpu_s: float
    resident_mb: float
    anonymous_mb: float
    kv_mb: float


def make_row(tokens: int, past: int, place: int) -> Row:
    """A row of arbitrary tokens in blocks of its own."""
    used = np.arange(-(-(past + tokens) // 32), dtype=np.int32)
    ids = np.arange(5, 5 + tokens, dtype=np.int64)
    return Row(tokens=ids, past=past, blocks=used + place * BLOCKS)


def open_path(bundle: Bundle, native: Native, cache: Path | None, threads: int) -> Executor:
    """The executor with one of the two paths."""
    settings = ExecutorSettings(
        choice="openvino",
        context_tokens=CONTEXT_TOKENS,
        rows=ROWS,
        threads=threads,
        native=native,
        cache_dir=cache,
    )
    return open_executor(bundle, settings)


def step_times(bundle: Bundle, repeats: int) -> list[StepTime]:
    """Interleaved; the first round warms up."""
    executors = {native: open_path(bundle, native, None, threads=1) for native in PATHS}
    samples: dict[tuple[str, Native], list[float]] = {}
    for repeat in range(repeats + 1):
        for name, (rows, tokens, past) in CASES.items():
            step = ExecutorStep(rows=tuple(make_row(tokens, past, i) for i in range(rows)))
            for native, executor in executors.items():
                taken = [_processor_ms(executor, step) for _ in range(IN_A_ROW)]
                if repeat:
                    # The first finds the caches as the other path left them.
                    samples.setdefault((name, native), []).extend(taken[1:])
    return [_compared(name, samples[name, "on"], samples[name, "off"]) for name in CASES]


def _processor_ms(executor: Executor, step: ExecutorStep) -> float:
    began_s = time.process_time()
    executor.execute(step)
    return 1000 * (time.process_time() - began_s)


def _compared(name: str, native: list[float], library: list[float]) -> StepTime:
    on, off = statistics.median(native), statistics.median(library)
    return StepTime(
        step=name, native_ms=round(on, 1), library_ms=round(off, 1), ratio=round(off / on, 2)
    )


def start(folder: Path, native: Native, cache: Path | None) -> Start:
    """In a process of its own."""
    command = [sys.executable, "-P", __file__, str(folder), "--start", native]
    command += [] if cache is None else ["--cache-dir", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Start(**json.loads(done.stdout))


def measured_start(bundle: Bundle, native: Native, cache: Path | None) -> Start:
    """What that process does."""
    executor = open_path(bundle, native, cache, threads=2)
    lines = Path("/proc/self/status").read_text().splitlines()
    memory = dict(line.split(":", 1) for line in lines)
    kv = executor.kv
    assert kv.kind == "paged"
    where = "" if cache is None else ", tiles kept"
    return Start(
        path=("native" if native == "on" else "library") + where,
        cpu_s=round(time.process_time(), 2),
        resident_mb=round(int(memory["VmRSS"].split()[0]) * 1024 / 1e6),
        anonymous_mb=round(int(memory["RssAnon"].split()[0]) * 1024 / 1e6),
        kv_mb=round(kv.blocks * kv.block_tokens * kv.bytes_per_token / 1e6),
    )


def main() -> int:
    """Print a table, or JSON with the command, versions and hardware."""
    from report import report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--start", choices=PATHS, help=argparse.SUPPRESS)
    parser.add_argument("--cache-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    if args.start is not None:
        print(json.dumps(asdict(measured_start(bundle, args.start, args.cache_dir))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        start(args.bundle, "on", Path(folder))  # writes the tiles
        starts = [
            start(args.bundle, "on", Path(folder)),
            start(args.bundle, "on", None),
            start(args.bundle, "off", None),
        ]
    steps = step_times(bundle, args.repeats)
    if args.json:
        found = {"steps": [asdict(one) for one in steps], "starts": [asdict(one) for one in starts]}
        print(report("edge/openvino_paths.py", ("openvino", "numpy"), found))
        return 0
    for one in steps:
        print(f"{one.step:<24} {one.native_ms:>8.1f} {one.library_ms:>8.1f} ms  x{one.ratio:.2f}")
    for begun in starts:
        print(begun)
    return 0


if __name__ == "__main__":
    sys.exit(main())
