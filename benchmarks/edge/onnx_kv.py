"""What the KV precisions of ONNX Runtime cost and save: quality on the demo's models, and speed.

Quality: prompts and right answers of the assistant's test split, token by token, against the same
bundle with float32 activations and KV (`model.exact.onnx`), calibrated on the training split.
Speed: decode steps and prefill chunks at short and long contexts, precisions taking turns in one
run; scales of any value take the same time, so a bundle of random weights gets its graphs here.

    python benchmarks/edge/onnx_kv.py quality --checkpoint examples/assistant/edge
    python benchmarks/edge/onnx_kv.py speed --bundle FOLDER --contexts 128,1024,2000
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.evaluation.measures import compare, summarise
from tidegate.converters.onnx.ranges import LayerRanges
from tidegate.converters.onnx.variants import write_variants
from tidegate.converters.recipe import make_recipe
from tidegate.edge.executors.onnx import OnnxExecutor, OnnxSettings
from tidegate.edge.executors.onnx_session import KvPrecision
from tidegate.edge.scoring import teacher_forced
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.engine.text import TextModel
from tidegate.model.architecture import Architecture
from tidegate.model.bundle import Bundle
from tidegate.model.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
PRECISIONS: tuple[KvPrecision, ...] = ("float32", "int8", "float16")
CONTEXT_TOKENS = 512
CALIBRATION_CHATS = 512


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of one graph, against float32 activations and KV on the same integers."""

    checkpoint: str
    kv: KvPrecision
    kv_bytes_per_token: int
    positions: int
    kl_mean: float
    kl_p99: float
    agreement: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Median of one step, and how much faster than with float32 KV in the same turn."""

    what: str
    past_tokens: int
    kv: KvPrecision
    step_ms: float
    over_float32: float


def quality(checkpoint: Path, prompts: int) -> list[Quality]:
    """Convert with both further graphs, feed the same tokens to all."""
    from assistant.corpus import generate

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chats = folder / "chats.jsonl"
        lines = [
            {"messages": [*one.messages, {"role": "assistant", "content": one.answer}]}
            for one in generate("train", count=CALIBRATION_CHATS)
        ]
        chats.write_text("\n".join(json.dumps(line) for line in lines))
        plan = ConversionPlan(
            model_id=checkpoint.name,
            targets=("onnx",),
            recipe=make_recipe(bits=4, group_size=64, symmetric=False),
            text=chats,
            graphs=("int8kv", "fp16"),
        )
        bundle = convert(checkpoint, folder / "bundle", plan)
        text = TextModel.load(bundle.folder, context_tokens=CONTEXT_TOKENS)
        sequences = [
            [*text.encode_chat(list(one.messages)), *text.encode_prompt(one.answer)]
            for one in generate("test", count=prompts)
        ]
        fitting = [one for one in sequences if len(one) < CONTEXT_TOKENS]
        return measured(bundle, fitting)


def measured(bundle: Bundle, sequences: Sequence[Sequence[int]]) -> list[Quality]:
    """Every precision against the exact graph."""
    exact = opened(bundle.folder, bundle.manifest.decoder, "float32", exact=True)
    reference = [logits.copy() for logits in teacher_forced(exact, sequences)]
    exact.close()
    results = []
    for kv in PRECISIONS:
        executor = opened(bundle.folder, bundle.manifest.decoder, kv)
        found = teacher_forced(executor, sequences)
        parts = [
            compare(right, got, one[1:])
            for right, got, one in zip(reference, found, sequences, strict=True)
        ]
        summary = summarise(parts)
        results.append(
            Quality(
                checkpoint=bundle.manifest.model_id,
                kv=kv,
                kv_bytes_per_token=executor.kv.bytes_per_token,
                positions=summary.positions,
                kl_mean=summary.kl_mean,
                kl_p99=summary.kl_p99,
                agreement=summary.agreement,
            )
        )
        executor.close()
    return results


def opened(
    folder: Path,
    arch: Architecture,
    kv: KvPrecision,
    *,
    exact: bool = False,
    context_tokens: int = CONTEXT_TOKENS,
    slots: int = 8,
) -> OnnxExecutor:
    """An executor over the `onnx/` folder of a bundle, on two threads."""
    settings = OnnxSettings(
        slots=slots,
        context_tokens=context_tokens,
        step_tokens=256,
        threads=2,
        kv_precision=kv,
        exact=exact,
    )
    return OnnxExecutor(folder / "onnx", arch, settings)


def with_graphs(bundle: Path, copy: Path) -> Manifest:
    """A copy of a bundle's ONNX target, its weights linked, with int8 KV of made-up scales."""
    manifest = Manifest.from_bytes((bundle / "manifest.json").read_bytes())
    arch = manifest.decoder
    (copy / "onnx").mkdir()
    shutil.copy(bundle / "onnx" / "model.onnx", copy / "onnx")
    (copy / "onnx" / "model.onnx.data").hardlink_to(bundle / "onnx" / "model.onnx.data")
    peaks = np.full((arch.kv_heads, arch.head_size), 4, np.float32)
    made_up = LayerRanges(keys=peaks, values=peaks, activations=1.0)
    write_variants(copy / "onnx", arch, ["int8kv"], [made_up] * arch.layers)
    return manifest


def speed(bundle: Path, contexts: Sequence[int], repeats: int) -> list[Speed]:
    """Steps of one and four rows and of 128 tokens, float32 and int8 in turns."""
    cases = {"decode, 1 row": (1, 1), "decode, 4 rows": (4, 1), "chunk of 128 tokens": (1, 128)}
    samples: dict[tuple[str, int, KvPrecision], list[float]] = {}
    # Beside the bundle, so that its weights need no second copy.
    with tempfile.TemporaryDirectory(dir=bundle.parent) as name:
        manifest = with_graphs(bundle, Path(name))
        longest = max(contexts) + 128
        executors = {
            kv: opened(Path(name), manifest.decoder, kv, context_tokens=longest, slots=4)
            for kv in PRECISIONS[:2]
        }
        for repeat in range(repeats + 1):
            for past in contexts:
                for what, (rows, tokens) in cases.items():
                    for kv, executor in executors.items():
                        step_s = timed(executor, rows, tokens, past)
                        if repeat:  # the first round warms up
                            samples.setdefault((what, past, kv), []).append(step_s)
    return [
        Speed(
            what=what,
            past_tokens=past,
            kv=kv,
            step_ms=round(statistics.median(times) * 1e3, 2),
            over_float32=round(
                statistics.median(
                    plain / one
                    for plain, one in zip(samples[what, past, "float32"], times, strict=True)
                ),
                2,
            ),
        )
        for (what, past, kv), times in samples.items()
    ]


def timed(executor: OnnxExecutor, rows: int, tokens: int, past: int) -> float:
    """Seconds of a step, the better of three."""
    ids = np.arange(5, 5 + tokens, dtype=np.int64)
    step = ExecutorStep(rows=tuple(Row(tokens=ids, past=past, slot=i) for i in range(rows)))
    found = []
    for _ in range(3):
        began_s = time.perf_counter()
        executor.execute(step)
        found.append(time.perf_counter() - began_s)
    return min(found)


def main() -> int:
    """Print a line per result, or JSON with the command, versions and hardware."""
    from report import report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples/assistant/edge")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--bundle", type=Path, help="of the shape to time, with an onnx target")
    parser.add_argument("--contexts", default="128,1024,1900")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.what == "speed" and args.bundle is None:
        parser.error("speed needs --bundle")
    contexts = [int(one) for one in args.contexts.split(",")]
    found: Sequence[Quality | Speed] = (
        quality(args.checkpoint, args.prompts)
        if args.what == "quality"
        else speed(args.bundle, contexts, args.repeats)
    )
    results = [asdict(one) for one in found]
    if args.json:
        print(report("edge/onnx_kv.py", ("onnxruntime", "torch"), results))
        return 0
    for one in results:
        print("  ".join(f"{key} {value}" for key, value in one.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
