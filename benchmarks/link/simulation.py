"""Thousands of simulated histories of the link: none may lose, double or change an answer.

Each history is a number: it gives the weather (loss, duplicates, reordering, damage, outages,
one-way partitions, clocks that are two hours wrong, a broker that says untrue things about who is
connected, crashes of either end at a random write, every
other one a power cut that takes all writes since the last synced one), one gateway or two, the
pacing and the window, and four requests of 0, 1, 12 and 60 payloads. After a minute the weather is
calm; whatever has not ended 14 minutes later is lost. Then, in calm weather, either end is killed
once before and once after every single write it makes, alone and with its machine.

    python benchmarks/link/simulation.py --schedules 20000 --keep FILE
    python benchmarks/link/simulation.py --seed 4711        # play one again and show it

`failed_by_name` are requests that their caller was told an error for: `deadline_exceeded`, when a
device died between two clocks that were wrong in opposite ways by more than the deadline together.
`link_...` are the counters of the processes that lived at the end of each history. With --work DIR
an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests/support")]

from linkends import make_fleet  # noqa: E402
from linkhistories import LENGTHS, Verdict, crash_points, history, with_crash  # noqa: E402
from report import report  # noqa: E402

BLOCK = 250
"""Histories that are counted, and written down with --work, at once."""
CRASH_SEEDS = 5
Sums = dict[str, float]


@contextmanager
def place() -> Iterator[tuple[Path, Path]]:
    """A fleet and a folder for the stores, in memory when there is such a place."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        root = Path(folder)
        make_fleet(root)
        (root / "stores").mkdir()
        yield root, root / "stores"


def count(sums: Sums, name: str, verdict: Verdict) -> list[str]:
    """Add a verdict to `sums`; what is wrong with it."""
    values = {
        "histories": 1,
        "submitted": verdict.submitted,
        "answered_once_and_whole": verdict.answered - verdict.wrong,
        "failed_by_name": verdict.failed,
        "lost": verdict.lost,
        "wrong": verdict.wrong,
        "twice_or_impossible": bool(verdict.problem),
        "crashes": verdict.crashes,
        "writes_lost_to_power_cuts": verdict.writes_lost,
        "messages": verdict.messages,
        "handler_runs": verdict.runs,
        "simulated_h": verdict.ended_s / 3600,
    } | {f"link_{key}": value for key, value in verdict.counters.items()}
    for key, value in values.items():
        sums[key] = sums.get(key, 0) + value
    return [] if verdict.kept else [f"{name}: {verdict}"]


def play_block(first: int, last: int) -> tuple[Sums, list[str]]:
    """The histories of some seeds."""
    sums: Sums = {}
    bad: list[str] = []
    with place() as (fleet, stores):
        for seed in range(first, last):
            bad += count(sums, f"seed {seed}", history(seed, fleet, stores))
    return sums, bad


def play_crashes(seed: int) -> tuple[Sums, list[str]]:
    """One history again and again, with one crash at each write of each end in turn."""
    sums: Sums = {}
    bad: list[str] = []
    with place() as (fleet, stores):
        for crash in crash_points(seed, fleet, stores):
            name = f"seed {seed}, {crash}"
            bad += count(sums, name, with_crash(seed, crash, fleet, stores))
    return sums, bad


def work(job: tuple[str, int, int]) -> tuple[str, Sums, list[str]]:
    """One job of a pool."""
    kind, first, last = job
    sums, bad = play_block(first, last) if kind == "random" else play_crashes(first)
    return kind, sums, bad


def jobs(schedules: int) -> list[tuple[str, int, int]]:
    blocks = range(0, schedules, BLOCK)
    return [("random", first, min(first + BLOCK, schedules)) for first in blocks] + [
        ("crash at every write", seed, seed + 1) for seed in range(CRASH_SEEDS)
    ]


def run(schedules: int, processes: int, log: Path | None) -> dict[str, object]:
    """All jobs, less those that `log` has the results of."""
    known: dict[str, list[object]] = {}
    if log is not None and log.exists():
        known = dict(json.loads(line) for line in log.read_text().splitlines())
    totals: dict[str, Sums] = {}
    bad: list[str] = []
    began_s = time.monotonic()
    open_jobs = []
    results = []
    for job in jobs(schedules):
        if (old := known.get(json.dumps(job))) is None:
            open_jobs.append(job)
        else:
            results.append((job[0], dict(old[0]), list(old[1])))  # type: ignore[call-overload]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for job, result in zip(open_jobs, pool.imap(work, open_jobs), strict=True):
            results.append(result)
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps([json.dumps(job), result[1:]]) + "\n")
            print(f"{job} done after {time.monotonic() - began_s:.0f} s", file=sys.stderr)
    for kind, sums, problems in results:
        total = Counter(totals.get(kind, {}))
        total.update(sums)
        totals[kind] = {key: round(value, 1) for key, value in total.items()}
        bad += problems
    return {"payloads_of_the_answers": LENGTHS, **totals, "bad": bad}


def main() -> int:
    """Play, print, keep; 1 when a history broke the promise."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--schedules", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, help="play this history only and show it")
    parser.add_argument("--work", type=Path, help="where an interrupted run goes on")
    parser.add_argument("--keep", type=Path, help="write the results to this file")
    options = parser.parse_args()
    if options.seed is not None:
        with place() as (fleet, stores):
            verdict = history(options.seed, fleet, stores)
        # `asdict` makes pairs of a Counter's keys in Python 3.11.
        shown = asdict(replace(verdict, counters=Counter())) | {"counters": verdict.counters}
        print(json.dumps(shown, indent=2))
        return not verdict.kept
    log = None
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        log = options.work / f"simulation-{options.schedules}.jsonl"
    results = run(options.schedules, options.processes, log)
    text = report("link/simulation.py", ("cryptography", "paho-mqtt"), results)
    print(text)
    if options.keep is not None:
        options.keep.write_text(text + "\n")
    return bool(results["bad"])


if __name__ == "__main__":
    sys.exit(main())
