"""Tokens guessed ahead: the trained assistant's answers with speculation on against off.

Greedy, one stream, prompts of the assistant's test split with answers of at least eight tokens:
single JSON actions, JSON schedules, others of both under a JSON schema, and answers that quote the
readings they were given. Each is guessed from its own text and from the answers before it, as by
default; for "own text" only from its own and its schema, as where callers are strangers. On and off
alternate prompt by prompt on one engine, on first, and no prompt comes twice, since what was
answered before helps to guess. A pass's ratio is of tokens per second from first to last token.
Answers must be the same.

With `--step-ms` a step is made to last as long as on a larger model: so many milliseconds for a
token, and for several what they cost beside one on the 1.1 B shape. The answers stay the
assistant's, so that shows what guessing gives where the executor, not the engine, takes the time.

    python benchmarks/edge/speculation.py --keep benchmarks/results/speculation.json
    python benchmarks/edge/speculation.py --step-ms 20 --prompts 10 --repeats 2
    python benchmarks/edge/speculation.py --quick
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

import numpy as np  # noqa: E402
from peers.asking import Answered, Question, ask, engine_on, tokens_per_s  # noqa: E402
from peers.bars import Bar  # noqa: E402
from peers.ours import prepare_bundle  # noqa: E402
from peers.rounds import tell  # noqa: E402
from report import report  # noqa: E402

from tidegate.engine.engine import Engine  # noqa: E402
from tidegate.engine.executor import Executor, ExecutorStep, StepResult  # noqa: E402
from tidegate.engine.request import Constraint  # noqa: E402

CONTEXT_TOKENS, MOST_TOKENS, LEAST_TOKENS = 512, 96, 8
STRUCTURED, UNFORETOLD = 2.0, 0.97
OWN = ", own text"
STEP_TOKENS, STEP_COSTS = (1, 2, 4, 8, 16), (1.0, 1.0, 1.15, 1.7, 2.9)
"""What tokens of one row cost beside one: TinyLlama 1.1 B, OpenVINO with the native layer, two
Zen 4 cores; each size after another one, medians of a loop over the bare executor."""
_TEXT = {"type": "string", "maxLength": 20}
_ACTION = {
    "type": "object",
    "properties": {
        "action": {"enum": ["set", "read"]},
        "device": _TEXT,
        "sensor": _TEXT,
        "room": _TEXT,
        "state": _TEXT,
        "value": {"type": "integer", "minimum": 0, "maximum": 999},
        "at": {"type": "string", "pattern": "^[0-9]{2}:[0-9]{2}$"},
        "minutes": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["action", "room"],
    "additionalProperties": False,
}
_ACTIONS = {"anyOf": [_ACTION, {"type": "array", "items": _ACTION, "maxItems": 4}]}
SCHEMA = Constraint(kind="json_schema", source=json.dumps(_ACTIONS))


class Paced:
    """An executor whose steps last longer; prompts do not."""

    def __init__(self, executor: Executor, step_s: float) -> None:
        self.limits, self.kv = executor.limits, executor.kv
        self.close = executor.close
        self._executor, self._step_s = executor, step_s

    def execute(self, step: ExecutorStep) -> StepResult:
        began_s = time.perf_counter()
        result = self._executor.execute(step)
        tokens = sum(len(row.tokens) for row in step.rows)
        if tokens <= STEP_TOKENS[-1]:
            lasts_s = self._step_s * float(np.interp(tokens, STEP_TOKENS, STEP_COSTS))
            time.sleep(max(0.0, began_s + lasts_s - time.perf_counter()))
        return result


@dataclass(frozen=True, kw_only=True)
class Pass:
    """All prompts of a task once with and once without."""

    plain_tokens_per_s: float
    guessed_tokens_per_s: float
    accepted: int
    guessed: int
    tokens: int
    different: int
    """Answers that speculation changed."""


def tasks(engine: Engine, prompts: int) -> dict[str, list[Question]]:
    """Questions by task, none of them in two: an answer that was given before is foretold."""
    from assistant.corpus import generate

    free = ("JSON action", "JSON schedule", "quotes")
    names = [*free, *(f"{name}, schema" for name in free[:2])]
    found: dict[str, list[Question]] = {name: [] for name in names}
    found |= {f"{name}{OWN}": [] for name in names[3:]}
    for number, example in enumerate(generate("test", count=200 * prompts)):
        if all(len(task) == prompts for task in found.values()):
            break
        kinds = {"{": "JSON action", "[": "JSON schedule"}
        kind = kinds.get(example.answer[0], "quotes")
        alike = [name for name in found if name.startswith(kind)]
        name = alike[number % len(alike)]
        task = found[name]
        prompt = engine.text.encode_chat(list(example.messages))
        answer = len(engine.text.encode_prompt(example.answer))
        fits = answer >= LEAST_TOKENS and len(prompt) + MOST_TOKENS < CONTEXT_TOKENS
        if fits and len(task) < prompts:
            constraint = SCHEMA if "schema" in name else None
            shared = not name.endswith(OWN)
            task.append(
                Question(
                    prompt=prompt, max_tokens=MOST_TOKENS, constraint=constraint, shared=shared
                )
            )
    return found


async def one_pass(engine: Engine, questions: Sequence[Question]) -> Pass:
    """Each question both ways; guessing goes first, or it would know the answer."""
    answers: Mapping[bool, list[Answered]] = {False: [], True: []}
    for question in questions:
        for guess in (True, False):
            asked = replace(question, speculation=guess)
            answers[guess].append(await ask(engine, "q", asked))
    plain, guessed = answers[False], answers[True]
    accepted = sum(one.accepted for one in guessed)
    return Pass(
        plain_tokens_per_s=tokens_per_s(plain),
        guessed_tokens_per_s=tokens_per_s(guessed),
        accepted=accepted,
        guessed=accepted + sum(one.rejected for one in guessed),
        tokens=sum(one.tokens for one in guessed),
        different=sum(a.text != b.text for a, b in zip(plain, guessed, strict=True)),
    )


async def measure(args: argparse.Namespace, bundle: Path) -> dict[str, list[Pass]]:
    """Passes by task; the first of each warms up and teaches what guessing costs."""
    passes: dict[str, list[Pass]] = {}
    sizes = {"context": CONTEXT_TOKENS, "rows": 8, "threads": args.threads}

    def behind(executor: Executor) -> Executor:
        return executor if args.step_ms is None else Paced(executor, args.step_ms / 1000)

    async with engine_on(bundle, args.executor, behind=behind, **sizes) as engine:
        asked = tasks(engine, args.prompts * (args.repeats + 1))
        for number in range(args.repeats + 1):
            for name, questions in asked.items():
                first = number * args.prompts
                done = await one_pass(engine, questions[first : first + args.prompts])
                tell(f"pass {number} of {args.repeats}, {name}: {done}")
                if number:
                    passes.setdefault(name, []).append(done)
    return passes


def gain(passes: Sequence[Pass]) -> float:
    """On over off, the median of the passes."""
    return statistics.median(one.guessed_tokens_per_s / one.plain_tokens_per_s for one in passes)


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--executor", choices=("openvino", "onnx"), default="openvino")
    parser.add_argument("--prompts", type=int, default=40, help="of each task")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--step-ms", type=float, metavar="MS", help="make a step last so long")
    parser.add_argument("--work", type=Path, default=ROOT / ".tidegate" / "bench")
    parser.add_argument("--quick", action="store_true", help="few prompts, one pass")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.repeats = 3, 1
    work = args.work / "assistant"
    work.mkdir(parents=True, exist_ok=True)
    bundle = prepare_bundle(ROOT / "examples/assistant/edge", work)
    passes = asyncio.run(measure(args, bundle))
    different = sum(one.different for found in passes.values() for one in found)
    bars = [
        Bar(
            what=f"speculation on / off, {name}",
            bar=STRUCTURED if name.startswith("JSON") and OWN not in name else UNFORETOLD,
            kind="at least",
            value=gain(found),
        )
        for name, found in passes.items()
    ]
    same = "answers that speculation changed"
    bars.append(Bar(what=same, bar=0, kind="at most", value=different, unit=""))
    body = {
        "executor": args.executor,
        "step_ms": args.step_ms,
        "prompts": args.prompts,
        "passes": {name: [asdict(one) for one in found] for name, found in passes.items()},
        "bars": [{**asdict(one), "verdict": one.verdict} for one in bars],
    }
    text = report("edge/speculation.py", ("numpy", "onnxruntime", "openvino"), body)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
        return 0
    for name, found in passes.items():
        last = found[-1]
        print(
            f"{name:<31} off {last.plain_tokens_per_s:>7.0f}  on {last.guessed_tokens_per_s:>7.0f}"
            f" tokens/s  x{gain(found):.2f}  accepted {last.accepted} of {last.guessed} guesses,"
            f" {last.tokens} tokens"
        )
    print("\n".join(one.line for one in bars))
    return 0


if __name__ == "__main__":
    sys.exit(main())
