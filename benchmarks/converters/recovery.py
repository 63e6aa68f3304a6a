"""What pruning, low rank, distillation and training through the rounding cost and bring.

The parent is the demo's edge model (2.9 million weights). Every variant is packed at 4 bits in
groups of 64 (the table at 8) and held against the parent in float32, over the answers of test
examples (the parent was trained on answers, not on prompts): mean divergence and agreement of the
next token, and the share of answers that are right to the last one. Speed is ONNX Runtime's, one
row at a context of 140, one thread; variants take turns and medians are compared with the parent at
4 bits. Sparse weights are stored and multiplied like others: neither smaller nor faster.

The text is conversations of the demo's corpus from seeds that the parent never saw. A student
without a teacher begins with the same weights and sees the same batches in the same order.

    python benchmarks/converters/recovery.py --out benchmarks/results/recovery.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from tidegate.converters.driver.pipeline import Job, Packed, compress
from tidegate.converters.driver.store import StoreWeights
from tidegate.converters.onnx.ops import export_onnx
from tidegate.converters.passes import is_model_pass, make_pass
from tidegate.converters.passes.base import CalibrationText, Model
from tidegate.converters.recipe_file import parse_recipe
from tidegate.converters.training.sequences import SequenceOps, batched
from tidegate.edge.executors.onnx import OnnxExecutor, OnnxSettings
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.kernels.torch_ops import WeightTensors
from tidegate.model.architecture import Architecture
from tidegate.model.blocks import linear_roles
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.recipe import Recipe, format_of
from tidegate.model.walk import Weights, decoder

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "examples"))

FIRST_SEED = 700_000_000
"""Of the text; the parent was trained on seeds from 100 million on."""

CALIBRATION_SEQUENCES = 128
STEP_SEQUENCES = 12
"""Conversations a step of 2048 tokens takes, rounded up: none is seen twice."""

EXAMPLES = 200
"""Of the test split, the four tiers in turn."""

PAST_TOKENS, CONTEXT_TOKENS = 140, 512

MLP = 'match = ["*.gate", "*.up", "*.down"]'
LAYERS = 'match = ["layers.*"]'
HALF = """
[[passes]]
kind = "prune_depth"
measure = "kl"
[[passes]]
kind = "prune_width"
keep = 0.5
"""


def single(kind: str, *lines: str) -> str:
    """A recipe's one pass."""
    return "\n".join(("[[passes]]", f'kind = "{kind}"', *lines)) + "\n"


def distilled(steps: int, *lines: str) -> str:
    """A last pass that trains; the seed of the order is 1."""
    rate = "learning_rate = 5e-4"
    return single("distill", f"steps = {steps}", rate, "batch_tokens = 2048", "seed = 1", *lines)


def variants(steps: int) -> dict[str, str]:
    """The passes of each variant, as TOML."""
    alone = ("kl_weight = 0.0", "hidden_weight = 0.0", "label_weight = 1.0")
    narrow = single("prune_width", "keep = 0.5")
    return {
        "4 bits": "",
        "magnitude 50 %": single("magnitude", LAYERS),
        "wanda 50 %": single("wanda", LAYERS),
        "magnitude 2:4": single("magnitude", LAYERS, 'pattern = "2:4"'),
        "wanda 2:4": single("wanda", LAYERS, 'pattern = "2:4"'),
        "low rank, 3/4 of the MLPs": single("low_rank", MLP, "ratio = 0.75"),
        "low rank, 1/2 of the MLPs": single("low_rank", MLP, "ratio = 0.5"),
        "width 3/4": single("prune_width", "keep = 0.75"),
        "width 3/4, uncompensated": single("prune_width", "keep = 0.75", "compensate = false"),
        "width 1/2": narrow,
        "depth 3 of 4": single("prune_depth", 'measure = "kl"'),
        "half": HALF,
        "half, distilled": HALF + distilled(steps),
        "half, trained without a teacher": HALF + distilled(steps, *alone),
        "width 1/2, distilled": narrow + distilled(steps),
        "4 bits, trained through the rounding": single(
            "qat", f"steps = {max(steps // 4, 1)}", "batch_tokens = 2048"
        ),
    }


@dataclass(frozen=True, kw_only=True)
class Example:
    """Tokens of a prompt and its right answer, which begins at `answer`."""

    tokens: tuple[int, ...]
    answer: int


@dataclass(kw_only=True)
class Result:
    """A variant beside its parent."""

    variant: str
    parameters: int
    weight_bytes: int
    size_over_4_bits: float
    kl_mean: float
    """Nats, from the parent in float32."""
    agreement: float
    exact_match: float
    made_in_s: float
    decode_over_4_bits: float | None = None
    """Tokens per second, relative to the parent at 4 bits; the same for all of one shape."""

    @property
    def shape(self) -> tuple[int, int]:
        """What decides its speed."""
        return self.parameters, self.weight_bytes


def training_text(tokenizer: Tokenizer, count: int) -> tuple[tuple[int, ...], ...]:
    """Conversations of all tiers, cut to 512 tokens."""
    from assistant.corpus import training_conversation
    from assistant.tokenizer import encode_messages

    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        conversation = training_conversation(seed, tier_weights=(1.2, 1.2, 1.2, 1.6))
        if conversation.turns:
            ids, _ = encode_messages(tokenizer, conversation.messages())
            found.append(tuple(ids[:CONTEXT_TOKENS]))
    return tuple(found)


def test_examples(tokenizer: Tokenizer) -> list[Example]:
    """Examples of the test split."""
    from assistant.corpus import generate
    from assistant.tokenizer import encode_messages

    found = []
    for example in generate("test", count=EXAMPLES):
        right = {"role": "assistant", "content": example.answer}
        ids, learned = encode_messages(tokenizer, [*example.messages, right])
        found.append(Example(tokens=tuple(ids), answer=len(ids) - sum(learned)))
    return found


@torch.inference_mode()
def said(arch: Architecture, weights: Weights, examples: Sequence[Example]) -> list[torch.Tensor]:
    """Log-probabilities [tokens, V] of every example."""
    tensors, found = WeightTensors(), []
    for batch in batched([example.tokens for example in examples], 2048):
        logits = decoder(SequenceOps(batch, tensors), arch, weights)
        chances = logits.log_softmax(dim=-1).half()
        found += list(torch.split(chances, [len(tokens) for tokens in batch]))
    return found


def quality(
    examples: Sequence[Example], parent: Sequence[torch.Tensor], found: Sequence[torch.Tensor]
) -> tuple[float, float, float]:
    """Mean divergence, agreement and the share of exact answers."""
    total, same, right, positions = 0.0, 0, 0, 0
    for example, meant, chances in zip(examples, parent, found, strict=True):
        # The token at position p predicts p + 1: the answer is predicted from the one before it.
        expected, got = (one[example.answer - 1 : -1].float() for one in (meant, chances))
        total += float((expected.exp() * (expected - got)).sum(dtype=torch.float64))
        same += int((expected.argmax(-1) == got.argmax(-1)).sum())
        positions += len(expected)
        answer = torch.tensor(example.tokens[example.answer :])
        right += bool((got.argmax(-1) == answer).all())
    return total / positions, same / positions, right / len(examples)


def make(
    recipe: Recipe, parent: Model, texts: Mapping[bool, CalibrationText], folder: Path
) -> tuple[Packed, float]:
    """Run a variant's recipe as the driver does, training on more text than the rest looks at.

    The packed model, and the seconds it took.
    """
    began_s = time.perf_counter()
    shown = {"at": 0.0}

    def progress(what: str, done: int, total: int) -> None:
        if time.perf_counter() - shown["at"] > 15:
            shown["at"] = time.perf_counter()
            print(f"  {recipe.name}: {what} {done}/{total}", file=sys.stderr, flush=True)

    model, rest = replace(parent, reference=parent), list(recipe.passes)
    while rest:
        made = make_pass(rest[0].kind, rest[0].options, rest[0].match)
        if not is_model_pass(made):
            break
        formats = {role: format_of(recipe, role) for role in linear_roles(model.arch)}
        text = texts[rest[0].kind in ("distill", "qat")]
        model = made.apply(replace(model, formats=formats), text, progress)
        rest.pop(0)
    folder.mkdir()
    packing = replace(recipe, passes=tuple(rest))
    packed = compress(
        Job(recipe=packing, model=model, text=texts[False], folder=folder, progress=progress)
    )
    return packed, time.perf_counter() - began_s


def speeds(models: dict[str, Packed], folder: Path, repeats: int) -> dict[str, float]:
    """Median decode speed of each over that of the first, in turns."""
    executors = {}
    for number, (name, packed) in enumerate(models.items()):
        place = folder / f"onnx-{number}"
        place.mkdir()
        assert isinstance(packed.arch, Architecture)
        export_onnx(packed.arch, StoreWeights(packed.store), place)
        settings = OnnxSettings(slots=1, context_tokens=CONTEXT_TOKENS, step_tokens=256, threads=1)
        executors[name] = OnnxExecutor(place, packed.arch, settings)
        tokens = np.arange(5, 5 + PAST_TOKENS, dtype=np.int64)
        executors[name].execute(ExecutorStep(rows=(Row(tokens=tokens, past=0, slot=0),)))
    row = Row(tokens=np.array([7], np.int64), past=PAST_TOKENS, slot=0)
    samples: dict[str, list[float]] = {name: [] for name in executors}
    for repeat in range(repeats + 1):
        for name, executor in executors.items():
            began_s = time.perf_counter()
            for _ in range(20):
                executor.execute(ExecutorStep(rows=(row,)))
            if repeat:  # the first round warms up
                samples[name].append(20 / (time.perf_counter() - began_s))
    medians = {name: statistics.median(found) for name, found in samples.items()}
    first = next(iter(medians.values()))
    return {name: round(found / first, 3) for name, found in medians.items()}


def measure(
    checkpoint: Path,
    steps: int,
    repeats: int,
    only: Sequence[str],
    out: Path | None,
    again: bool,
) -> None:
    """Make and measure every variant, writing what is known after each."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    sequences = training_text(tokenizer, max(steps * STEP_SEQUENCES, CALIBRATION_SEQUENCES))
    texts = {
        trains: CalibrationText(name="corpus", sha256="", sequences=found)
        for trains, found in ((False, sequences[:CALIBRATION_SEQUENCES]), (True, sequences))
    }
    examples = test_examples(tokenizer)
    results = _earlier(out) if again else []
    models: dict[str, Packed] = {}
    with tempfile.TemporaryDirectory() as scratch, Checkpoint.open(checkpoint) as opened:
        arch, folder = opened.decoder, Path(scratch)
        parent = said(arch, opened.weights(), examples)
        _, _, exact = quality(examples, parent, parent)
        facts = {
            "parent": {"parameters": arch.parameters, "exact_match": round(exact, 4)},
            "examples": EXAMPLES,
            "training": {"steps": steps, "batch_tokens": 2048, "first_text_seed": FIRST_SEED},
        }
        for number, (name, passes) in enumerate(variants(steps).items()):
            if only and number and name not in only:
                continue
            model = Model(arch=arch, weights=opened.weights())
            recipe = parse_recipe(f'name = "{name}"\n{passes}', f"{name}.toml")
            packed, made_in_s = make(recipe, model, texts, folder / f"work-{number}")
            models[name] = packed
            assert isinstance(packed.arch, Architecture)
            weights = StoreWeights(packed.store)
            _, nbytes = weights.bits_and_bytes()
            kl, agreement, exact = quality(examples, parent, said(packed.arch, weights, examples))
            found = Result(
                variant=name,
                parameters=packed.arch.parameters,
                weight_bytes=nbytes,
                size_over_4_bits=round(nbytes / (results or [_Bytes(nbytes)])[0].weight_bytes, 3),
                kl_mean=round(kl, 5),
                agreement=round(agreement, 4),
                exact_match=round(exact, 4),
                made_in_s=round(made_in_s, 1),
            )
            others = [one for one in results if one.variant != name]
            order = list(variants(steps))
            results = sorted([*others, found], key=lambda one: order.index(one.variant))
            print(found, file=sys.stderr, flush=True)
            _write(out, facts, results)
        ratios = speeds(models, folder, repeats)
        shapes = {one.shape: ratios[one.variant] for one in results if one.variant in ratios}
        for one in results:
            one.decode_over_4_bits = shapes.get(one.shape, one.decode_over_4_bits)
    print(_write(out, facts, results))


def _earlier(out: Path | None) -> list[Result]:
    """What an earlier run has written."""
    assert out is not None
    body = json.loads(out.read_text())
    return [Result(**one) for one in body["results"]["variants"]]


@dataclass(frozen=True)
class _Bytes:
    weight_bytes: int


def _write(out: Path | None, facts: dict[str, object], results: Sequence[Result]) -> str:
    from report import report

    packages = ("torch", "onnxruntime", "numpy")
    body = {**facts, "variants": [asdict(one) for one in results]}
    text = report("converters/recovery.py", packages, body)
    if out is not None:
        out.write_text(text + "\n")
    return text


def main() -> int:
    """Measure, and print JSON with the command, versions and hardware."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples/assistant/edge")
    parser.add_argument("--steps", type=int, default=200, help="of each distillation")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of the timing")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--only", nargs="+", default=(), help="variants beside the first")
    parser.add_argument("--out", type=Path, help="file to write the JSON to, after each variant")
    parser.add_argument("--again", action="store_true", help="keep what --out holds of others")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure(args.checkpoint, args.steps, args.repeats, args.only, args.out, args.again)
    return 0


if __name__ == "__main__":
    sys.exit(main())
