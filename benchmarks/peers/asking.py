"""An engine of our own in this process, asked a list of requests some at a time.

For what is measured per answer and not per step: speculation, constraints. Nothing is reused from
one request to the next unless a request says so, so that the order does not matter.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tidegate.edge.executors.choice import Choice, ExecutorSettings, open_executor
from tidegate.engine.engine import Engine
from tidegate.engine.events import Finished, TextDelta
from tidegate.engine.executor import Executor
from tidegate.engine.request import Constraint, GenerationRequest, RequestId, SamplingParams
from tidegate.engine.settings import EngineSettings
from tidegate.engine.text import TextModel
from tidegate.model.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request, as far as these benchmarks vary it."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    constraint: Constraint | None = None
    speculation: bool = False
    shared: bool = False
    """The answer may help to guess others, and others to guess it; no prefix is reused for it."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One answer, and what it took."""

    text: str
    reason: str
    tokens: int
    decode_s: float
    """From the first token to the last."""
    accepted: int
    rejected: int
    """Tokens guessed ahead that held, and that did not."""


@asynccontextmanager
async def engine_on(
    bundle: Path,
    choice: Choice,
    *,
    context: int,
    rows: int,
    threads: int,
    behind: Callable[[Executor], Executor] = lambda executor: executor,
) -> AsyncIterator[Engine]:
    """Open a bundle and run an engine over it, or over what `behind` puts before it."""
    opened = Bundle.open(bundle)
    settings = ExecutorSettings(choice=choice, context_tokens=context, rows=rows, threads=threads)
    executor = open_executor(opened, settings)
    text = TextModel.load(opened.folder, context_tokens=context)
    line = EngineSettings(most_waiting=100_000, prefix_reuse=False)
    engine = Engine(behind(executor), text, model_id=opened.manifest.model_id, settings=line)
    running = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        executor.close()


async def ask_all(engine: Engine, questions: Sequence[Question], at_once: int) -> list[Answered]:
    """Answers in the order of the questions, of which `at_once` run at a time."""
    places = asyncio.Semaphore(at_once)

    async def one(number: int, question: Question) -> Answered:
        async with places:
            return await ask(engine, f"{number}", question)

    return list(await asyncio.gather(*(one(n, asked) for n, asked in enumerate(questions))))


async def ask(engine: Engine, name: str, question: Question) -> Answered:
    """One answer; anything but a finished one is a defect of the benchmark."""
    await engine.prepare(question.constraint)
    sampling = SamplingParams(
        max_tokens=question.max_tokens,
        temperature=question.temperature,
        seed=question.seed,
        ignore_eos=question.ignore_eos,
    )
    request = GenerationRequest(
        id=RequestId(name),
        prompt=question.prompt,
        sampling=sampling,
        reuse=question.shared,
        constraint=question.constraint,
        speculation=question.speculation,
    )
    texts: list[str] = []
    async for event in engine.submit(request):
        if isinstance(event, TextDelta):
            texts.append(event.text)
        else:
            last = event
    assert isinstance(last, Finished), last
    return Answered(
        text="".join(texts),
        reason=last.reason,
        tokens=last.usage.completion_tokens,
        decode_s=last.timing.decode_s,
        accepted=last.usage.accepted_draft_tokens,
        rejected=last.usage.rejected_draft_tokens,
    )


def tokens_per_s(answers: Sequence[Answered]) -> float:
    """Of decoding alone: an answer's first token belongs to its prompt."""
    return sum(one.tokens - 1 for one in answers) / sum(one.decode_s for one in answers)
