"""One set of packed integers, executed by torch, ONNX Runtime and OpenVINO: do they choose alike?

The assistant's edge checkpoint is converted once; torch runs the same integers dequantised, in
float32. Every sequence (prompt and right answer, test split) is fed token by token, so each
position's choice is compared on the same history. A disagreement counts with the gap between the
reference's two best logits there: a near tie is rounding, a wide gap is a defect.

    python benchmarks/edge/agreement.py --prompts 50 --json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tidegate.cloud.torch_executor import TorchExecutor, TorchSettings
from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import RecipeWeights, make_recipe
from tidegate.edge.executors.choice import ExecutorSettings, open_executor
from tidegate.engine.executor import Executor, ExecutorStep, Row
from tidegate.engine.text import TextModel
from tidegate.model.bundle import Bundle
from tidegate.model.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
CONTEXT_TOKENS = 512

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Forced:
    """Token ids of a prompt and its right answer; `answer_start` is where the answer begins."""

    tokens: tuple[int, ...]
    answer_start: int


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often one execution chose what the reference chose."""

    execution: str
    activations: str
    positions: int
    agreement: float
    answer_positions: int
    answer_agreement: float
    widest_gap: float
    """The largest top-two gap of the reference at a disagreement, in logits; 0 if there is none."""
    largest_error: float
    """The largest difference of any logit."""


def corpus_sequences(text: TextModel, count: int) -> list[Forced]:
    """The first `count` examples of the test split whose tokens fit the context."""
    from assistant.corpus import generate

    found: list[Forced] = []
    for example in generate("test", count=4 * count):
        prompt = text.encode_chat(list(example.messages))
        tokens = prompt + text.encode_prompt(example.answer)
        if len(tokens) < CONTEXT_TOKENS and len(found) < count:
            found.append(Forced(tokens=tokens, answer_start=len(prompt)))
    return found


def teacher_forced(executor: Executor, sequences: Sequence[Forced]) -> list[Logits]:
    """Logits [tokens, V] of every sequence, each token a decode step, several rows at a time."""
    rows_at_once = executor.limits.step_rows
    logits = [np.empty((len(one.tokens), executor.limits.vocab), np.float32) for one in sequences]
    for start in range(0, len(sequences), rows_at_once):
        group = range(start, min(start + rows_at_once, len(sequences)))
        longest = max(len(sequences[i].tokens) for i in group)
        for position in range(longest):
            live = [i for i in group if position < len(sequences[i].tokens)]
            step = ExecutorStep(
                rows=tuple(_row(executor, sequences[i], position, i - start) for i in live)
            )
            for i, row in zip(live, executor.execute(step).logits, strict=True):
                logits[i][position] = row
    return logits


def _row(executor: Executor, sequence: Forced, position: int, place: int) -> Row:
    tokens = np.array(sequence.tokens[position : position + 1], np.int64)
    kv = executor.kv
    if kv.kind == "slots":
        return Row(tokens=tokens, past=position, slot=place)
    blocks = -(-CONTEXT_TOKENS // kv.block_tokens)
    first = place * blocks
    used = -(-(position + 1) // kv.block_tokens)
    return Row(tokens=tokens, past=position, blocks=np.arange(first, first + used, dtype=np.int32))


def compare(
    name: str,
    activations: str,
    sequences: Sequence[Forced],
    reference: Sequence[Logits],
    found: Sequence[Logits],
) -> Agreement:
    """Count agreeing choices over all positions, and over those that predict the answer."""
    same: list[npt.NDArray[np.bool_]] = []
    in_answer: list[npt.NDArray[np.bool_]] = []
    gaps: list[npt.NDArray[np.float32]] = []
    for sequence, expected, got in zip(sequences, reference, found, strict=True):
        same.append(expected.argmax(-1) == got.argmax(-1))
        # The token at position p predicts p + 1: the answer is predicted from the one before it.
        in_answer.append(np.arange(len(expected)) >= sequence.answer_start - 1)
        best = np.partition(expected, -2, axis=-1)[:, -2:]
        gaps.append(best[:, 1] - best[:, 0])
    agree, answer, gap = (np.concatenate(one) for one in (same, in_answer, gaps))
    errors = [np.abs(a - b).max() for a, b in zip(reference, found, strict=True)]
    return Agreement(
        execution=name,
        activations=activations,
        positions=len(agree),
        agreement=float(agree.mean()),
        answer_positions=int(answer.sum()),
        answer_agreement=float(agree[answer].mean()),
        widest_gap=float(gap[~agree].max(initial=0.0)),
        largest_error=float(max(errors)),
    )


def measure(checkpoint: Path, prompts: int, group_size: int, symmetric: bool) -> list[Agreement]:
    """Convert, run all five executions over the same sequences, compare."""
    recipe = make_recipe(bits=4, group_size=group_size, symmetric=symmetric)
    with tempfile.TemporaryDirectory() as folder:
        bundle_folder = Path(folder) / "bundle"
        plan = ConversionPlan(model_id="edge", targets=("onnx", "openvino"), recipe=recipe)
        bundle = convert(checkpoint, bundle_folder, plan)
        text = TextModel.load(bundle.folder, context_tokens=CONTEXT_TOKENS)
        sequences = corpus_sequences(text, prompts)
        with Checkpoint.open(checkpoint) as opened:
            torch_executor = TorchExecutor(
                opened.decoder,
                RecipeWeights(opened.weights(), recipe),
                TorchSettings(slots=8, context_tokens=CONTEXT_TOKENS),
            )
        reference = teacher_forced(torch_executor, sequences)
        results = []
        for target in ("onnx", "openvino"):
            for exact in (True, False):
                found = _run(bundle, target, exact, sequences)
                kind = "fp32" if exact else "int8"
                results.append(compare(target, kind, sequences, reference, found))
    return results


def _run(bundle: Bundle, target: str, exact: bool, sequences: Sequence[Forced]) -> list[Logits]:
    settings = ExecutorSettings(
        choice="onnx" if target == "onnx" else "openvino",
        context_tokens=CONTEXT_TOKENS,
        rows=8,
        exact=exact,
    )
    executor = open_executor(bundle, settings)
    try:
        return teacher_forced(executor, sequences)
    finally:
        executor.close()


def main() -> int:
    """Print a table, or JSON with the command, versions and hardware."""
    from report import report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples/assistant/edge")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = measure(args.checkpoint, args.prompts, args.group_size, args.symmetric)
    if args.json:
        packages = ("torch", "onnxruntime", "openvino")
        print(report("edge/agreement.py", packages, [asdict(one) for one in results]))
        return 0
    print("execution  activations  positions  agree   answer positions  agree   widest gap  error")
    for one in results:
        print(
            f"{one.execution:<10} {one.activations:<12} {one.positions:>9}  {one.agreement:.4f}"
            f"  {one.answer_positions:>16}  {one.answer_agreement:.4f}"
            f"  {one.widest_gap:>10.4f}  {one.largest_error:.2e}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
