"""What single choices of the executors are worth: each on and off, side by side in one process.

Two executors of one bundle take turns step by step; a ratio is within a pair of neighbouring steps,
and the median of those counts.

    huge pages, native   the native layer's tiles in huge pages, instead of the mapped file; what it
                         is worth depends on the pages that the system keeps the file in, so try one
                         that was written just now and, by --cache-dir, one that was read back
    gated MLP            one operation for gate, up, activation and down, instead of separate ones

    python benchmarks/edge/choices.py BUNDLE --keep benchmarks/results/choices.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tidegate.edge.executors import openvino, openvino_native
from tidegate.edge.executors.choice import ExecutorSettings, open_executor
from tidegate.edge.executors.openvino import OpenVinoExecutor
from tidegate.engine.executor import Executor, ExecutorStep, Row
from tidegate.model.bundle import Bundle

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
CONTEXT_TOKENS, ROWS, THREADS = 512, 8, 2
BLOCK_TOKENS = 32
STEPS = {"1 row": (1, 1), "4 rows": (4, 1), "8 rows": (8, 1), "prefill of 256": (1, 256)}
"""Rows, and tokens of each; single ones come after 128 others."""
NEVER_S = 1e6


@dataclass(frozen=True, kw_only=True)
class Worth:
    """Clock milliseconds of one step without and with the choice, and how much faster with it."""

    choice: str
    step: str
    without_ms: float
    with_ms: float
    ratio: float


@contextmanager
def setting(module: object, name: str, value: object) -> Iterator[None]:
    """The module's constant, otherwise for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def opened(bundle: Bundle, cache: Path | None) -> Executor:
    """The executor, warmed up."""
    settings = ExecutorSettings(
        choice="openvino",
        context_tokens=CONTEXT_TOKENS,
        rows=ROWS,
        threads=THREADS,
        cache_dir=cache,
    )
    return open_executor(bundle, settings)


def native_in_huge_pages(bundle: Bundle, cache: Path) -> tuple[Executor, Executor]:
    """Without and with."""
    with setting(openvino, "_HUGE_AFTER_S", NEVER_S):
        opened(bundle, cache).close()  # the file is there from now on
        mapped = opened(bundle, cache)
    with setting(openvino, "_HUGE_AFTER_S", 0.0):
        moved = opened(bundle, cache)
    assert isinstance(moved, OpenVinoExecutor)
    while not moved.in_huge_pages:
        time.sleep(0.05)
    return mapped, moved


def gated_mlp(bundle: Bundle, cache: Path) -> tuple[Executor, Executor]:
    """Without and with; both from memory in huge pages."""
    with setting(openvino_native, "find_gated_mlps", lambda products: []):
        single = opened(bundle, None)
    return single, opened(bundle, None)


CHOICES: dict[str, Callable[[Bundle, Path], tuple[Executor, Executor]]] = {
    "huge pages, native": native_in_huge_pages,
    "gated MLP": gated_mlp,
}


def make_row(place: int, tokens: int, past: int) -> Row:
    """A row of arbitrary tokens in KV of its own."""
    ids = np.random.default_rng(place).integers(5, 1000, tokens)
    each = CONTEXT_TOKENS // BLOCK_TOKENS
    blocks = np.arange(each * place, each * (place + 1), dtype=np.int32)
    return Row(tokens=ids, past=past, blocks=blocks)


def step_ms(executor: Executor, rows: int, tokens: int) -> float:
    """One step on the clock."""
    past = 128 if tokens == 1 else 0
    step = ExecutorStep(rows=tuple(make_row(i, tokens, past) for i in range(rows)))
    began_s = time.perf_counter()
    executor.execute(step)
    return 1000 * (time.perf_counter() - began_s)


def compared(choice: str, pair: tuple[Executor, Executor], rounds: int) -> list[Worth]:
    """Every step, by turns; the first round warms up."""
    taken: dict[tuple[str, int], list[float]] = defaultdict(list)
    for turn in range(rounds + 1):
        order = (0, 1) if turn % 2 else (1, 0)
        for name, (rows, tokens) in STEPS.items():
            for _ in range(4 if tokens == 1 else 1):
                for which in order:
                    ms = step_ms(pair[which], rows, tokens)
                    if turn:
                        taken[name, which].append(ms)
    return [
        Worth(
            choice=choice,
            step=name,
            without_ms=round(statistics.median(taken[name, 0]), 1),
            with_ms=round(statistics.median(taken[name, 1]), 1),
            ratio=round(
                statistics.median(
                    a / b for a, b in zip(taken[name, 0], taken[name, 1], strict=True)
                ),
                3,
            ),
        )
        for name in STEPS
    ]


def main() -> int:
    """Print a table; keep it with the command, versions and hardware."""
    from report import report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--choices", nargs="+", choices=[*CHOICES], default=[*CHOICES])
    parser.add_argument("--cache-dir", type=Path, help="tiles kept there by an earlier start")
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    found: list[Worth] = []
    for choice in args.choices:
        with tempfile.TemporaryDirectory() as fresh:
            pair = CHOICES[choice](bundle, args.cache_dir or Path(fresh))
            some = compared(choice, pair, args.rounds)
            for executor in pair:
                executor.close()
        for one in some:
            print(
                f"{one.choice:<20} {one.step:<16} {one.without_ms:>8.1f} -> {one.with_ms:>8.1f} ms"
                f"  x{one.ratio:.3f}",
                flush=True,
            )
        found += some
    if args.keep is not None:
        steps = [asdict(one) for one in found]
        kept = report("edge/choices.py", ("openvino", "numpy"), steps)
        args.keep.write_text(kept + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
