"""Guessing ahead at one and four streams, on both executors, with answers nothing foretells too.

Structured answers (JSON actions), answers that copy (the fourth turn of a conversation about one
table), and sampled text that nothing foretells. The engine with guesses and the one without take
turns on one executor, requests one after another or four at a time, greedy but for the text.
Compared is the time from a request's first token to its last, medians of the repeats' ratios; and
the answers, which must be the same.

    python benchmarks/edge/guessing.py --model cloud --draft edge --draft-only
    python benchmarks/edge/guessing.py --json > benchmarks/results/guessing.json
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import make_recipe
from tidegate.edge.draft_model import open_draft
from tidegate.edge.executors.choice import Choice, ExecutorSettings, open_executor
from tidegate.engine.engine import Engine
from tidegate.engine.events import Finished, TextDelta
from tidegate.engine.request import GenerationRequest, RequestId, SamplingParams
from tidegate.engine.settings import EngineSettings
from tidegate.engine.text import TextModel

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
CONTEXT_TOKENS, ROWS = 640, 4
TEXT_TOKENS = 96


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request of a workload."""

    prompt: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, kw_only=True)
class Ran:
    """One turn of an engine over a workload."""

    answers: list[tuple[int, ...]]
    tokens_per_s: float
    """Of decoding, all streams together."""
    answer_s: float
    """For all requests, prompts included."""
    cpu_s: float
    """Of the processor, likewise; hardly changes with what else the machine does."""
    drafted: int
    accepted: int


@dataclass(kw_only=True)
class Turns:
    """All turns of one workload at one number of streams, plain and guessing by turns."""

    plain: list[Ran] = field(default_factory=list)
    guessing: list[Ran] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Medians over the repeats."""

    executor: str
    workload: str
    streams: int
    plain_tokens_per_s: float
    guessing_tokens_per_s: float
    decode_ratio: float
    """Of decoding alone; the bar for structured answers at one stream is 2, for text 0.97."""
    answer_ratio: float
    """Of whole requests, prompts included."""
    cpu_ratio: float
    """Of the processor time of whole requests: plain over guessing, as the others."""
    accepted_share: float
    """Of the tokens guessed."""
    tokens_from_guesses: float
    """Share of the answers' tokens."""
    same_answers: str


def workloads(text: TextModel, count: int, part: int) -> dict[str, list[Asked]]:
    """What is asked, by name; prompts of the test split, which no training saw.

    Args:
        text: the tokenizer.
        count: requests of each.
        part: another number gives other requests.
    """
    from assistant.corpus import generate

    greedy = SamplingParams(max_tokens=96, temperature=0)
    examples = list(generate("test", count=6 * count, first=6 * count * part))
    actions = [one for one in examples if one.answer.startswith(("{", "["))][:count]
    found = {
        "structured": [
            Asked(prompt=text.encode_chat(list(one.messages)), sampling=greedy) for one in actions
        ],
        "copying": [
            Asked(prompt=text.encode_chat(list(conversation(n))), sampling=greedy)
            for n in range(part * count, part * count + count)
        ],
    }
    found["text"] = [
        Asked(
            prompt=text.encode_chat(list(one.messages)),
            sampling=SamplingParams(
                max_tokens=TEXT_TOKENS, temperature=1.2, seed=part * count + n, ignore_eos=True
            ),
        )
        for n, one in enumerate(examples[:count])
    ]
    return found


def conversation(seed: int) -> Sequence[object]:
    """Four questions about one table, the last of them open."""
    from assistant.corpus import Conversation, draw_turn
    from assistant.readings import draw_table

    rng = random.Random(seed)
    table = draw_table(rng, rows=6)
    drawn = (draw_turn(rng, "test", 3, table, held_out=False) for _ in range(40))
    turns = tuple(turn for turn in drawn if turn is not None)[:4]
    told = Conversation(system=None, table=table, table_in_system=False, turns=turns)
    return told.messages()[:-1]


async def run(engine: Engine, asked: Sequence[Asked], streams: int) -> Ran:
    """All requests, so many at a time, on an engine that runs."""
    before, queue = engine.snapshot(), list(enumerate(asked))
    ends: list[Finished] = []
    answers: list[tuple[int, ...]] = [()] * len(asked)

    async def stream() -> None:
        while queue:
            number, one = queue.pop(0)
            request = GenerationRequest(
                id=RequestId(str(number)), prompt=one.prompt, sampling=one.sampling
            )
            *texts, end = [event async for event in engine.submit(request)]
            assert isinstance(end, Finished), end
            ends.append(end)
            answers[number] = tuple(
                token for event in texts if isinstance(event, TextDelta) for token in event.tokens
            )

    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(stream() for _ in range(streams)))
    answer_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    now = engine.snapshot()
    decoded = sum(end.usage.completion_tokens - 1 for end in ends)
    return Ran(
        answers=answers,
        tokens_per_s=streams * decoded / sum(end.timing.decode_s for end in ends),
        answer_s=answer_s,
        cpu_s=cpu_s,
        drafted=now.draft_tokens - before.draft_tokens,
        accepted=now.accepted_draft_tokens - before.accepted_draft_tokens,
    )


async def compare(
    plain: Engine, guessing: Engine, text: TextModel, count: int, repeats: int
) -> dict[tuple[str, int], Turns]:
    """Alternate an engine with guesses and one without; both go on learning, as daemons do.

    No request comes twice, or an answer would be foretold by itself.
    """
    found: dict[tuple[str, int], Turns] = {}
    loops = [asyncio.create_task(engine.run()) for engine in (plain, guessing)]
    for repeat in range(repeats + 1):
        for place, streams in enumerate((1, ROWS)):
            for name, asked in workloads(text, count, 2 * repeat + place).items():
                one, other = await run(plain, asked, streams), await run(guessing, asked, streams)
                if repeat:  # the first round warms up
                    turns = found.setdefault((name, streams), Turns())
                    turns.plain.append(one)
                    turns.guessing.append(other)
    for loop in loops:
        loop.cancel()
    await asyncio.gather(*loops, return_exceptions=True)
    return found


def summary(executor: str, name: str, streams: int, turns: Turns) -> Result:
    """The medians of one comparison."""
    pairs = list(zip(turns.plain, turns.guessing, strict=True))
    tokens = sum(len(answer) for one in turns.guessing for answer in one.answers)
    drafted = sum(one.drafted for one in turns.guessing)
    accepted = sum(one.accepted for one in turns.guessing)
    same = sum(
        a == b for plain, guess in pairs for a, b in zip(plain.answers, guess.answers, strict=True)
    )
    return Result(
        executor=executor,
        workload=name,
        streams=streams,
        plain_tokens_per_s=round(statistics.median(one.tokens_per_s for one in turns.plain), 1),
        guessing_tokens_per_s=round(
            statistics.median(one.tokens_per_s for one in turns.guessing), 1
        ),
        decode_ratio=round(statistics.median(b.tokens_per_s / a.tokens_per_s for a, b in pairs), 3),
        answer_ratio=round(statistics.median(a.answer_s / b.answer_s for a, b in pairs), 3),
        cpu_ratio=round(statistics.median(a.cpu_s / b.cpu_s for a, b in pairs), 3),
        accepted_share=round(accepted / max(1, drafted), 3),
        tokens_from_guesses=round(accepted / max(1, tokens), 3),
        same_answers=f"{same} of {sum(len(plain.answers) for plain, _ in pairs)}",
    )


def measure(args: argparse.Namespace) -> list[Result]:
    """Convert once, then every executor in turn."""
    targets: tuple[Choice, ...] = ("onnx", "openvino")
    plan = ConversionPlan(
        model_id=args.model,
        targets=("onnx", "openvino"),
        recipe=make_recipe(bits=4, group_size=64, symmetric=False),
    )
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = convert(ROOT / "examples/assistant" / args.model, Path(folder) / "main", plan)
        text = TextModel.load(bundle.folder, context_tokens=CONTEXT_TOKENS)
        for target in targets if args.executor == "both" else (args.executor,):
            executor = open_executor(bundle, executor_settings(target, args))
            draft_executor, drafter = None, None
            if args.draft is not None:
                small = convert(
                    ROOT / "examples/assistant" / args.draft, Path(folder) / target, plan
                )
                draft_executor, drafter = open_draft(
                    small.folder, bundle, executor.limits, executor_settings(target, args)
                )
            engines = (
                Engine(
                    executor,
                    text,
                    model_id=args.model,
                    # The two take turns on one memory, so neither may trust what it left there.
                    settings=EngineSettings(speculation=guesses, prefix_reuse=False),
                    draft_model=drafter if guesses else None,
                    drafters=() if args.draft_only else None,
                )
                for guesses in (False, True)
            )
            plain, guessing = engines
            found = asyncio.run(compare(plain, guessing, text, args.requests, args.repeats))
            executor.close()
            if draft_executor is not None:
                draft_executor.close()
            results += [summary(target, *key, turns) for key, turns in found.items()]
    return results


def executor_settings(target: Choice, args: argparse.Namespace) -> ExecutorSettings:
    """As a device runs it."""
    return ExecutorSettings(
        choice=target,
        context_tokens=CONTEXT_TOKENS,
        rows=ROWS,
        threads=args.threads,
        exact=args.exact,
    )


def main() -> int:
    """Print a table, or JSON with the command, versions and hardware."""
    from report import report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("edge", "cloud"), default="edge")
    parser.add_argument("--executor", choices=("both", "onnx", "openvino"), default="both")
    parser.add_argument("--draft", choices=("edge", "cloud"), help="a second model that guesses")
    parser.add_argument("--draft-only", action="store_true", help="no other guesses than its")
    parser.add_argument("--requests", type=int, default=40, help="of each workload")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--exact", action="store_true", help="float activations and KV")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = measure(args)
    if args.json:
        packages = ("onnxruntime", "openvino")
        print(report("edge/guessing.py", packages, [asdict(one) for one in results]))
        return 0
    for one in results:
        print(
            f"{one.executor:<9} {one.workload:<11} {one.streams} x"
            f" {one.plain_tokens_per_s:>8.1f} {one.guessing_tokens_per_s:>8.1f} tokens/s"
            f"  x{one.decode_ratio:.2f}, answers x{one.answer_ratio:.2f},"
            f" processor x{one.cpu_ratio:.2f},"
            f" {one.accepted_share:.0%} held, same: {one.same_answers}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
