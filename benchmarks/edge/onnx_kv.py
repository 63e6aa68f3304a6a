"""What the KV precisions of ONNX Runtime cost and save: quality on the demo's models, and speed.

Quality: prompts and right answers of the assistant's test split, token by token, against the same
bundle with float32 activations and KV (`model.exact.onnx`), calibrated on the training split.
Attention: what its operators take of a decode step and of a prefill chunk at short and long
contexts, by ONNX Runtime's profiler, precisions taking turns; all else costs the same. Scales of
any value take the same time, so a bundle of random weights gets its graphs here.

    python benchmarks/edge/onnx_kv.py quality --checkpoint examples/assistant/edge
    python benchmarks/edge/onnx_kv.py attention --bundle FOLDER --contexts 128,1024,1900
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.evaluation.measures import compare, summarise
from tidegate.converters.onnx.ranges import LayerRanges
from tidegate.converters.onnx.variants import write_variants
from tidegate.converters.recipe import make_recipe
from tidegate.edge.executors.onnx import OnnxExecutor, OnnxSettings
from tidegate.edge.executors.onnx_session import GRAPHS, KvPrecision
from tidegate.edge.scoring import teacher_forced
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
class Attention:
    """Of all layers of one step, and how many times what it takes with float32 KV."""

    what: str
    past_tokens: int
    kv: KvPrecision
    attention_ms: float
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


def attention(bundle: Path, contexts: Sequence[int], repeats: int) -> list[Attention]:
    """Steps of one and four rows and of 128 tokens, float32 and int8 in turns."""
    cases = {"decode, 1 row": (1, 1), "decode, 4 rows": (4, 1), "chunk of 128 tokens": (1, 128)}
    results = []
    # Beside the bundle, so that its weights need no second copy.
    with tempfile.TemporaryDirectory(dir=bundle.parent) as name:
        folder = Path(name)
        arch = with_graphs(bundle, folder).decoder
        for past in contexts:
            for what, (rows, tokens) in cases.items():
                found: dict[KvPrecision, list[float]] = {kv: [] for kv in PRECISIONS[:2]}
                for _ in range(repeats):
                    for kv, times in found.items():
                        step = (rows, tokens, past)
                        times += profiled(folder / "onnx" / GRAPHS[kv], arch, step)
                typical = {kv: lower_quarter(times) * arch.layers for kv, times in found.items()}
                results += [
                    Attention(
                        what=what,
                        past_tokens=past,
                        kv=kv,
                        attention_ms=round(time_ms, 2),
                        over_float32=round(time_ms / typical["float32"], 2),
                    )
                    for kv, time_ms in typical.items()
                ]
    return results


def profiled(graph: Path, arch: Architecture, step: tuple[int, int, int]) -> list[float]:
    """Milliseconds of every attention operator in a few equal steps (rows, tokens, past)."""
    rows, tokens, past = step
    with tempfile.TemporaryDirectory() as name:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_profiling = True
        options.profile_file_prefix = f"{name}/profile"
        session = onnxruntime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"]
        )
        kind = np.float32 if graph.name == GRAPHS["float32"] else np.int8
        shape = (rows, arch.kv_heads, past + tokens, arch.head_size)
        inputs: dict[str, np.ndarray] = {
            "input_ids": np.full((rows, tokens), 5),
            "seqlens_k": np.full(rows, past + tokens - 1, np.int32),
            "total_sequence_length": np.array(past + tokens, np.int32),
            "sampled": np.arange(rows),
        }
        binding = session.io_binding()
        for item in session.get_inputs():
            value = inputs.setdefault(item.name, np.ones(shape, kind))
            binding.bind_cpu_input(item.name, value)
            if item.name.startswith("past_"):
                present = item.name.replace("past_", "present_")
                binding.bind_output(present, "cpu", 0, kind, shape, value.ctypes.data)
        binding.bind_output("logits")
        for _ in range(3):
            session.run_with_iobinding(binding)
        events = json.loads(Path(session.end_profiling()).read_text())
    return [
        event["dur"] / 1e3
        for event in events
        if event["name"].endswith("kernel_time")
        and event["args"].get("op_name") == "GroupQueryAttention"
    ]


def lower_quarter(times: Sequence[float]) -> float:
    """Mean of the shorter quarter: what else the machine does only makes times longer."""
    return statistics.mean(sorted(times)[: max(len(times) // 4, 1)])


def main() -> int:
    """Print a line per result, or JSON with the command, versions and hardware."""
    from report import report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("quality", "attention"))
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples/assistant/edge")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--bundle", type=Path, help="of the shape to time, with an onnx target")
    parser.add_argument("--contexts", default="128,1024,1900")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.what == "attention" and args.bundle is None:
        parser.error("attention needs --bundle")
    contexts = [int(one) for one in args.contexts.split(",")]
    found: Sequence[Quality | Attention] = (
        quality(args.checkpoint, args.prompts)
        if args.what == "quality"
        else attention(args.bundle, contexts, args.repeats)
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
