"""`Bench`: runs points of a calibration through a real engine, and says what their steps took.

Nothing is guessed ahead and no prefix is reused, as costs are of what is computed. Requests begin
one after the other, so that prompts are computed alone or beside rows that decode, as they are when
people ask. Other programs stretch single steps, rarely the same one in every run of a point: of
each step the low fifth of its runs counts.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final

from tidegate.edge.energy.calibrate_points import GridPoint
from tidegate.edge.energy.corrections import Periods
from tidegate.engine.engine import Engine
from tidegate.engine.events import Failed
from tidegate.engine.executor import Executor
from tidegate.engine.request import GenerationRequest, RequestId, SamplingParams
from tidegate.engine.settings import EngineSettings
from tidegate.engine.steps import StepReport
from tidegate.engine.text import TextModel
from tidegate.errors import ExecutionError

_QUIET: Final = 0.2
"""The quantile of a step's runs that counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A step with a part of the last request's prompt."""

    tokens: int
    past_tokens: int
    beside: int
    """Rows that decoded in it."""
    context_tokens: int
    """Of those rows together."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """One run of a point."""

    parts: tuple[Part, ...]
    steps_s: tuple[float, ...]
    """Those in which all rows decoded."""
    context_tokens: float
    """Of all rows together, in the middle of these steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What a point takes, out of all its runs."""

    point: GridPoint
    parts: tuple[Part, ...]
    step_s: float
    context_tokens: float
    steps: int
    """Of a run, in which all rows decoded."""
    whole_s: float
    """Median over runs, as they were, of the last prompt and these steps together."""
    spread: float
    """How much longer the upper fifth of its decoding steps took than the lower."""

    @property
    def prefill_s(self) -> float:
        """Of the last request's prompt."""
        return sum(part.seconds for part in self.parts)

    @property
    def decode_s(self) -> float:
        """Of the steps that give all rows their answers."""
        return self.point.output_tokens * self.step_s


class Bench:
    """See the module. `open_bench` makes one and runs its engine."""

    def __init__(
        self, executor: Executor, text: TextModel, *, clock: Callable[[], float], seed: int = 0
    ) -> None:
        """Prompts are random tokens, drawn by `seed`."""
        self._reports: list[tuple[StepReport, float]] = []
        self._periods = Periods()
        self._begun: dict[RequestId, asyncio.Event] = {}
        """Set when a request has its first token."""
        self.limits = executor.limits
        self.clock = clock
        self.engine = Engine(
            executor,
            text,
            model_id="calibration",
            settings=EngineSettings(speculation=False, prefix_reuse=False),
            watcher=self._watch,
            clock=clock,
        )
        self._random = random.Random(seed)
        self._requests = 0

    async def run(self, point: GridPoint) -> Ran:
        """Run a point once.

        Raises:
            ExecutionError: a request failed.
        """
        self._reports.clear()
        last = RequestId("")
        # In steps with one part of a later prompt each, earlier rows go on with their answers.
        parts = -(-point.prompt_tokens // max(1, self.limits.step_tokens - point.rows)) + 2
        async with asyncio.TaskGroup() as tasks:
            for later in reversed(range(point.rows)):
                request = self._request(point.prompt_tokens, point.output_tokens + later * parts)
                last, begun = request.id, asyncio.Event()
                self._begun[request.id] = begun
                tasks.create_task(self._answer(request))
                await begun.wait()
        return _read(self._reports, last, point.rows)

    async def keep_busy(self, prompt_tokens: int, output_tokens: int, seconds: float) -> None:
        """Run requests one after the other for at least `seconds`."""
        until_s = self.clock() + seconds
        while self.clock() < until_s:
            self._reports.clear()
            await self._answer(self._request(prompt_tokens, output_tokens))

    def _watch(self, report: StepReport) -> None:
        self._reports.append((report, self._periods.of(report)))
        for share in report.shares:
            if share.sampled_tokens and share.request_id in self._begun:
                self._begun[share.request_id].set()

    def _request(self, prompt_tokens: int, output_tokens: int) -> GenerationRequest:
        self._requests += 1
        vocab = self.limits.vocab
        most = self.limits.context_tokens - prompt_tokens
        return GenerationRequest(
            id=RequestId(f"calibration {self._requests}"),
            prompt=tuple(self._random.randrange(vocab) for _ in range(prompt_tokens)),
            sampling=SamplingParams(
                max_tokens=min(most, output_tokens), temperature=0.0, ignore_eos=True
            ),
        )

    async def _answer(self, request: GenerationRequest) -> None:
        try:
            async for event in self.engine.submit(request):
                if isinstance(event, Failed):
                    raise ExecutionError(f"a run of the calibration failed: {event.message}")
        finally:
            if (begun := self._begun.pop(request.id, None)) is not None:
                begun.set()


@asynccontextmanager
async def open_bench(
    executor: Executor, text: TextModel, *, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[Bench]:
    """A bench whose engine runs; the executor stays its owner's."""
    bench = Bench(executor, text, clock=clock)
    running = asyncio.create_task(bench.engine.run())
    try:
        yield bench
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


def settled(point: GridPoint, runs: Sequence[Ran]) -> Sample | None:
    """What a point takes, out of its runs; None if no run was complete.

    Steps are compared with those of the same shape, of which a point has the same in every run.
    """
    whole = [one for one in runs if one.steps_s and one.parts]
    if not whole:
        return None
    shapes: dict[tuple[int, int, int], list[float]] = {}
    for run in whole:
        for part in run.parts:
            shapes.setdefault(_shape(part), []).append(part.seconds)
    steps_s = [one for run in whole for one in run.steps_s]
    return Sample(
        point=point,
        parts=tuple(replace(one, seconds=quiet(shapes[_shape(one)])) for one in whole[0].parts),
        step_s=quiet(steps_s),
        context_tokens=statistics.median([run.context_tokens for run in whole]),
        steps=statistics.median_low([len(run.steps_s) for run in whole]),
        whole_s=statistics.median(
            [sum(part.seconds for part in run.parts) + sum(run.steps_s) for run in whole]
        ),
        spread=quantile(steps_s, 1 - _QUIET) / quiet(steps_s) - 1,
    )


def quiet(seconds: Sequence[float]) -> float:
    """What a step takes where other programs do not hold it up: the low fifth of its runs."""
    return quantile(seconds, _QUIET)


def quantile(values: Sequence[float], share: float) -> float:
    """Interpolated between the nearest two."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    before = int(place)
    after = min(before + 1, len(ordered) - 1)
    return ordered[before] + (place - before) * (ordered[after] - ordered[before])


def _shape(part: Part) -> tuple[int, int, int]:
    return part.tokens, part.past_tokens, part.beside


def _read(reports: Sequence[tuple[StepReport, float]], last: RequestId, rows: int) -> Ran:
    """The parts of the last prompt, and the steps in which all rows decoded."""
    parts, steps, contexts = list[Part](), list[float](), list[int]()
    for report, seconds in reports:
        beside = [one for one in report.shares if not one.is_prompt]
        context = sum(one.past_tokens + one.computed_tokens for one in beside)
        prompts = [one for one in report.shares if one.is_prompt]
        if prompts and prompts[0].request_id == last:
            parts.append(
                Part(
                    tokens=prompts[0].computed_tokens,
                    past_tokens=prompts[0].past_tokens,
                    beside=len(beside),
                    context_tokens=context,
                    seconds=seconds,
                )
            )
        elif not prompts and len(beside) == rows:
            steps.append(seconds)
            contexts.append(context)
    return Ran(
        parts=tuple(parts),
        steps_s=tuple(steps),
        context_tokens=statistics.median(contexts) if contexts else 0.0,
    )
