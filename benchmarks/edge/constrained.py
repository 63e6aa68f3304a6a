"""JSON-schema answers: how many are valid, and what the constraint costs beside free text.

Valid: random schemas, one per answer, of the trained assistant at temperature 1, eight at a time;
checked by a validator of our own. Cost: the same prompts free and as a list of small records that
is longer than what is timed, so that both are equally long, at one and at eight streams and without
guessing ahead, which a constraint would gain by; free and constrained alternate. On the assistant a
step takes well under a millisecond, so it bears the constraint's whole weight; with `--shape` the
cost is measured on random weights of that shape as well.

    python benchmarks/edge/constrained.py --shape tinyllama-1.1b \
        --keep benchmarks/results/constrained.json
    python benchmarks/edge/constrained.py --quick
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

from converters.synthetic import SHAPES  # noqa: E402
from peers.asking import Answered, Question, ask_all, engine_on  # noqa: E402
from peers.bars import Bar  # noqa: E402
from peers.ours import checkpoint_of, prepare_bundle  # noqa: E402
from peers.rounds import tell  # noqa: E402
from peers.schemas import draw_object, is_valid  # noqa: E402
from report import report  # noqa: E402

from tidegate.engine.engine import Engine  # noqa: E402
from tidegate.engine.request import Constraint  # noqa: E402

CONTEXT_TOKENS, STREAMS, PROMPT_TOKENS = 512, 8, 128
SLOWDOWN = 1.15
MOST_TOKENS = 300
"""Of an answer whose schema is bounded well below."""
_RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 12},
        "minutes": {"type": "integer", "minimum": 0, "maximum": 999},
        "state": {"enum": ["on", "off", "open", "closed"]},
    },
    "required": ["name", "minutes", "state"],
    "additionalProperties": False,
}
_RECORDS = {"type": "array", "items": _RECORD, "minItems": 200}
"""Longer than any answer that is timed, so that constrained ones are as long as free ones."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds per step of streams that decode together."""

    model: str
    streams: int
    free_step_s: float
    constrained_step_s: float


async def valid(engine: Engine, count: int) -> list[str]:
    """Answers that are not what their schema says, of so many."""
    from assistant.corpus import generate

    rng = random.Random(7)
    schemas = [draw_object(rng) for _ in range(count)]
    chats = [engine.text.encode_chat(list(one.messages)) for one in generate("test", count=50)]
    questions = [
        Question(
            prompt=chats[number % len(chats)],
            max_tokens=MOST_TOKENS,
            temperature=1.0,
            seed=number,
            constraint=Constraint(kind="json_schema", source=json.dumps(schema)),
            speculation=True,
        )
        for number, schema in enumerate(schemas)
    ]
    wrong: list[str] = []
    for start in range(0, count, 100):
        asked = slice(start, start + 100)
        answers = await ask_all(engine, questions[asked], STREAMS)
        for schema, answer in zip(schemas[asked], answers, strict=True):
            if not holds(schema, answer):
                wrong.append(f"{answer.reason}: {answer.text!r} for {json.dumps(schema)}")
        tell(f"{start + len(answers)} of {count} answers, {len(wrong)} not valid")
    return wrong


def holds(schema: dict[str, object], answer: Answered) -> bool:
    """Whether an answer ended by itself, is JSON, and is what the schema says."""
    try:
        return answer.reason == "stop" and is_valid(schema, json.loads(answer.text))
    except ValueError:
        return False


async def cost(
    engine: Engine, model: str, repeats: int, tokens: int, prompts: Sequence[tuple[int, ...]]
) -> list[Cost]:
    """One and eight streams, free and constrained in turns; the first round warms up."""
    constraint = Constraint(kind="json_schema", source=json.dumps(_RECORDS))
    costs: list[Cost] = []
    for number in range(repeats + 1):
        for streams in (1, STREAMS):
            free = [
                Question(
                    prompt=prompt, max_tokens=tokens, temperature=1.0, seed=number, ignore_eos=True
                )
                for prompt in prompts[:streams]
            ]
            bound = [replace(one, constraint=constraint, ignore_eos=False) for one in free]
            both = {"free": free, "bound": bound}
            order = sorted(both, reverse=number % 2 == 0)
            steps = {name: step_s(await ask_all(engine, both[name], streams)) for name in order}
            made = Cost(
                model=model,
                streams=streams,
                free_step_s=steps["free"],
                constrained_step_s=steps["bound"],
            )
            tell(f"{number} of {repeats}: {made}")
            costs += [made] if number else []
    return costs


def step_s(answers: Sequence[Answered]) -> float:
    """Seconds from token to token, the mean over the streams."""
    return statistics.fmean(one.decode_s / (one.tokens - 1) for one in answers)


async def assistant(args: argparse.Namespace, bundle: Path) -> tuple[list[str], list[Cost]]:
    """Validity and cost on the trained model."""
    sizes = {"context": CONTEXT_TOKENS, "rows": STREAMS, "threads": args.threads}
    async with engine_on(bundle, args.executor, **sizes) as engine:
        wrong = await valid(engine, args.answers)
        prompts = random_prompts(600)
        return wrong, await cost(engine, "assistant", args.repeats, args.tokens, prompts)


async def shaped(args: argparse.Namespace, bundle: Path) -> list[Cost]:
    """Cost on random weights of a published shape."""
    sizes = {"context": CONTEXT_TOKENS, "rows": STREAMS, "threads": args.threads}
    async with engine_on(bundle, args.executor, **sizes) as engine:
        prompts = random_prompts(SHAPES[args.shape].vocab)
        return await cost(engine, args.shape, args.repeats, args.tokens, prompts)


def random_prompts(vocab: int) -> list[tuple[int, ...]]:
    """One for each stream."""
    rng = random.Random(3)
    return [tuple(rng.choices(range(10, vocab), k=PROMPT_TOKENS)) for _ in range(STREAMS)]


def bars_of(answers: int, wrong: int, costs: Sequence[Cost]) -> list[Bar]:
    """Valid answers, and the median slowdown of each model and number of streams."""
    bars = [Bar(what="valid answers", bar=answers, kind="at least", value=answers - wrong, unit="")]
    for key in dict.fromkeys((one.model, one.streams) for one in costs):
        ratios = [
            one.constrained_step_s / one.free_step_s
            for one in costs
            if (one.model, one.streams) == key
        ]
        what = f"step, JSON schema / free text: {key[0]}, {key[1]} streams"
        value = statistics.median(ratios)
        bars.append(Bar(what=what, bar=SLOWDOWN, kind="at most", value=value))
    return bars


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, help="measure the cost on it as well")
    parser.add_argument("--executor", choices=("openvino", "onnx"), default="openvino")
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer that is timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / ".tidegate" / "bench")
    parser.add_argument("--quick", action="store_true", help="few answers, one round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.quick:
        args.answers, args.repeats, args.tokens = 20, 1, 16
    work = args.work / "assistant"
    work.mkdir(parents=True, exist_ok=True)
    bundle = prepare_bundle(ROOT / "examples/assistant/edge", work)
    wrong, costs = asyncio.run(assistant(args, bundle))
    if args.shape is not None:
        work = args.work / args.shape
        bundle = prepare_bundle(checkpoint_of(args.shape, work), work)
        costs += asyncio.run(shaped(args, bundle))
    bars = bars_of(args.answers, len(wrong), costs)
    body = {
        "executor": args.executor,
        "answers": args.answers,
        "wrong": wrong,
        "costs": [asdict(one) for one in costs],
        "bars": [{**asdict(one), "verdict": one.verdict} for one in bars],
    }
    text = report("edge/constrained.py", ("numpy", "llguidance", "openvino"), body)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else "\n".join([*wrong, *(one.line for one in bars)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
