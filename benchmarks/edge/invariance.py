"""Does an answer change with what runs beside it, how its prompt is cut, or what was cached?

Greedy answers of the demo's edge model on the test split, through the engine and each executor as
a device runs it (int8 activations, or float ones with `--exact`): alone, then in batches of 4, with
the prompt in chunks, and with the prefix cache on. Counts answers with exactly the same tokens.

    python benchmarks/edge/invariance.py --json
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import make_recipe
from tidegate.edge.executors.choice import Choice, ExecutorSettings, open_executor
from tidegate.engine.engine import Engine
from tidegate.engine.events import TextDelta
from tidegate.engine.request import GenerationRequest, RequestId, SamplingParams
from tidegate.engine.settings import EngineSettings
from tidegate.engine.text import TextModel
from tidegate.model.bundle import Bundle

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
CONTEXT_TOKENS, ROWS = 512, 4

Answers = list[tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Invariance:
    """How many answers had the same tokens as alone."""

    executor: str
    how: str
    same: int
    answers: int


async def answers(engine: Engine, prompts: Sequence[tuple[int, ...]], *, at_once: int) -> Answers:
    """Greedy answers, `at_once` requests at a time."""

    async def one(number: int) -> tuple[int, ...]:
        request = GenerationRequest(
            id=RequestId(str(number)),
            prompt=prompts[number],
            sampling=SamplingParams(max_tokens=64, temperature=0),
        )
        events = [event async for event in engine.submit(request)]
        return tuple(
            token for event in events if isinstance(event, TextDelta) for token in event.tokens
        )

    running = asyncio.create_task(engine.run())
    found: Answers = []
    for start in range(0, len(prompts), at_once):
        group = range(start, min(start + at_once, len(prompts)))
        found += await asyncio.gather(*(one(number) for number in group))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return found


def measure(checkpoint: Path, count: int, *, exact: bool) -> list[Invariance]:
    """Convert once, then run every variation on a fresh executor."""
    from assistant.corpus import generate

    plan = ConversionPlan(
        model_id="edge",
        targets=("onnx", "openvino"),
        recipe=make_recipe(bits=4, group_size=64, symmetric=False),
    )
    targets: tuple[Choice, ...] = ("onnx", "openvino")
    with tempfile.TemporaryDirectory() as folder:
        bundle = convert(checkpoint, Path(folder) / "bundle", plan)
        text = TextModel.load(bundle.folder, context_tokens=CONTEXT_TOKENS)
        examples = generate("test", count=count)
        prompts = [text.encode_chat(list(example.messages)) for example in examples]
        return [one for target in targets for one in _compare(bundle, target, text, prompts, exact)]


def _compare(
    bundle: Bundle, target: Choice, text: TextModel, prompts: list[tuple[int, ...]], exact: bool
) -> list[Invariance]:
    def run(settings: EngineSettings, *, at_once: int = 1) -> Answers:
        sizes = ExecutorSettings(
            choice=target, context_tokens=CONTEXT_TOKENS, rows=ROWS, exact=exact
        )
        executor = open_executor(bundle, sizes)
        engine = Engine(executor, text, model_id="edge", settings=settings)
        try:
            return asyncio.run(answers(engine, prompts, at_once=at_once))
        finally:
            executor.close()

    alone = run(EngineSettings(prefix_reuse=False))
    found = {
        "batches of 4": run(EngineSettings(prefix_reuse=False), at_once=4),
        "chunks of 16": run(EngineSettings(prefix_reuse=False, chunk_tokens=16)),
        "chunks of 32": run(EngineSettings(prefix_reuse=False, chunk_tokens=32)),
        "prefix cache": run(EngineSettings()),
    }
    return [
        Invariance(
            executor=target,
            how=how,
            same=sum(a == b for a, b in zip(alone, got, strict=True)),
            answers=len(alone),
        )
        for how, got in found.items()
    ]


def main() -> int:
    """Print a table, or JSON with the command, versions and hardware."""
    from report import report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples/assistant/edge")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--exact", action="store_true", help="float activations and KV")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = measure(args.checkpoint, args.prompts, exact=args.exact)
    if args.json:
        packages = ("onnxruntime", "openvino")
        print(report("edge/invariance.py", packages, [asdict(one) for one in results]))
        return 0
    for one in results:
        print(f"{one.executor:<9} {one.how:<13} {one.same} of {one.answers}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
