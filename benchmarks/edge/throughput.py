"""Tokens per second of each executor on the demo's edge model, side by side in one run.

Decode at 1, 2, 4 and 8 rows with a context of about 140 tokens, prefill of 128. Executors take
turns within every repeat and medians are compared, so what else the machine does hits all alike.
Peers and large shapes are another benchmark's subject; this one shows what the demo runs on.

    python benchmarks/edge/throughput.py --json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tidegate.cloud.torch_executor import TorchExecutor, TorchSettings
from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import RecipeWeights, make_recipe
from tidegate.edge.executors.choice import ExecutorSettings, open_executor
from tidegate.engine.executor import Executor, ExecutorStep, Row
from tidegate.model.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
CONTEXT_TOKENS, PAST_TOKENS, PREFILL_TOKENS = 512, 140, 128
ROWS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Median tokens per second of one executor, and its ratio to torch in the same run."""

    executor: str
    what: str
    tokens_per_s: float
    over_torch: float


def make_row(executor: Executor, tokens: int, past: int, place: int) -> Row:
    """A row of arbitrary tokens in a place of its own."""
    ids = np.arange(5, 5 + tokens, dtype=np.int64)
    kv = executor.kv
    if kv.kind == "slots":
        return Row(tokens=ids, past=past, slot=place)
    blocks = -(-CONTEXT_TOKENS // kv.block_tokens)
    used = np.arange(-(-(past + tokens) // kv.block_tokens), dtype=np.int32)
    return Row(tokens=ids, past=past, blocks=used + place * blocks)


def steps() -> dict[str, tuple[int, int, int]]:
    """What is timed: (rows, tokens per row, past)."""
    decode = {f"decode, {rows} rows": (rows, 1, PAST_TOKENS) for rows in ROWS}
    return decode | {f"prefill, {PREFILL_TOKENS} tokens": (1, PREFILL_TOKENS, 0)}


def timed(executor: Executor, rows: int, tokens: int, past: int, inner: int) -> float:
    """Tokens per second over `inner` equal steps."""
    step = ExecutorStep(rows=tuple(make_row(executor, tokens, past, i) for i in range(rows)))
    began_s = time.perf_counter()
    for _ in range(inner):
        executor.execute(step)
    return rows * tokens * inner / (time.perf_counter() - began_s)


def measure(checkpoint: Path, repeats: int, threads: int) -> list[Speed]:
    """Convert, open all three, interleave."""
    recipe = make_recipe(bits=4, group_size=64, symmetric=False)
    plan = ConversionPlan(model_id="edge", targets=("onnx", "openvino"), recipe=recipe)
    samples: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, Checkpoint.open(checkpoint) as opened:
        bundle = convert(checkpoint, Path(folder) / "bundle", plan)
        executors: dict[str, Executor] = {
            "torch": TorchExecutor(
                opened.decoder,
                RecipeWeights(opened.weights(), recipe),
                TorchSettings(slots=8, context_tokens=CONTEXT_TOKENS, threads=threads),
            )
        }
        for target in ("onnx", "openvino"):
            settings = ExecutorSettings(
                choice="onnx" if target == "onnx" else "openvino",
                context_tokens=CONTEXT_TOKENS,
                rows=8,
                threads=threads,
            )
            executors[target] = open_executor(bundle, settings)
        for repeat in range(repeats + 1):
            for what, (rows, tokens, past) in steps().items():
                for name, executor in executors.items():
                    speed = timed(executor, rows, tokens, past, inner=10)
                    if repeat:  # the first round warms up
                        samples.setdefault((name, what), []).append(speed)
    medians = {key: statistics.median(values) for key, values in samples.items()}
    return [
        Speed(
            executor=name,
            what=what,
            tokens_per_s=round(value, 1),
            over_torch=round(value / medians["torch", what], 2),
        )
        for (name, what), value in medians.items()
    ]


def main() -> int:
    """Print a table, or JSON with the command, versions and hardware."""
    from report import report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples/assistant/edge")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    speeds = measure(args.checkpoint, args.repeats, args.threads)
    if args.json:
        packages = ("torch", "onnxruntime", "openvino")
        print(report("edge/throughput.py", packages, [asdict(one) for one in speeds]))
        return 0
    for one in speeds:
        print(f"{one.what:<22} {one.executor:<9} {one.tokens_per_s:>9.1f}  x{one.over_torch:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
