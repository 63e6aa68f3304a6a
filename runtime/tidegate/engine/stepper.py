"""`Stepper`: the one thread in which tokens are guessed, run by the executor, and chosen.

All of it stays off the event loop: top-p over a large vocabulary takes milliseconds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tidegate.engine.choosing import Ask, Choice, accepted, choose
from tidegate.engine.device_sampling import (
    DeviceChoosing,
    Pending,
    PipelinedExecutor,
    SamplingExecutor,
)
from tidegate.engine.drafts import Draft
from tidegate.engine.executor import Executor, ExecutorStep, Row, StepResult
from tidegate.engine.one_thread import OneThread
from tidegate.engine.sampling import Sampled
from tidegate.engine.speculation import Guessing, Speculator
from tidegate.errors import ExecutionError, TidegateError, describe_defect

_log = logging.getLogger(__name__)


def no_loads() -> tuple[int, ...]:
    """For a step that loads nothing."""
    return ()


def no_choices() -> tuple[Choice, ...]:
    """For a step that asks for no token."""
    return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A step, how the tokens of its sampling rows are chosen, and what comes before and after."""

    step: ExecutorStep
    asks: tuple[Ask, ...]
    guessing: Guessing | None = None
    """Which rows may guess."""
    load: Callable[[], tuple[int, ...]] = no_loads
    """Runs after the step and before anything is chosen, in the same thread."""

    @property
    def guessed(self) -> tuple[int, ...]:
        """Tokens that each ask's row guesses."""
        return tuple(len(ask.draft) for ask in self.asks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a step: a choice per ask, or an error."""

    choices: tuple[Choice, ...] = ()
    guessed: tuple[int, ...] = ()
    """Tokens that each ask's row guessed."""
    error: TidegateError | None = None
    elapsed_s: float = 0.0
    """Of the rows, choosing included."""
    loaded: tuple[int, ...] = ()
    """What the loads returned."""


@dataclass(kw_only=True, slots=True, eq=False)
class Flight:
    """A step that was launched and has not landed."""

    work: Work
    launched_s: float
    pending: Pending | None = None
    error: TidegateError | None = None


class Stepper:
    """Runs one step at a time. `close` lets a running step end, but only for so long."""

    def __init__(
        self,
        executor: Executor,
        speculator: Speculator | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Run `executor`; without a `speculator` nothing is guessed."""
        self._executor = executor
        self._sampling = executor if isinstance(executor, SamplingExecutor) else None
        self._pipeline = executor if isinstance(executor, PipelinedExecutor) else None
        self._landed_s = 0.0
        self._speculator = speculator
        self._clock = clock
        self._thread: OneThread[Outcome] = OneThread("tidegate-step")
        self._running: asyncio.Future[Outcome] | None = None

    async def run(self, work: Work) -> Outcome:
        """Run a step, then its loads, in the thread.

        Errors come back as an outcome, never as an exception.
        """
        self._running = self._thread.submit(partial(self._run, work))
        # A step can not be interrupted: cancelling the loop must not lose sight of it.
        return await asyncio.shield(self._running)

    @property
    def pipelines(self) -> bool:
        """Whether the executor takes a step while another runs."""
        return self._pipeline is not None

    def launch(self, work: Work) -> Flight:
        """Begin a step that guesses and loads nothing, behind the one that runs."""
        flight = Flight(work=work, launched_s=self._clock())
        self._running = self._thread.submit(partial(self._launch, flight))
        return flight

    async def land(self, flight: Flight) -> Outcome:
        """Wait for a step; flights land in the order in which they were launched."""
        self._running = self._thread.submit(partial(self._land, flight))
        return await asyncio.shield(self._running)

    def _launch(self, flight: Flight) -> Outcome:
        assert self._pipeline is not None, "who launches has such an executor"
        draws = [ask.draw for ask in flight.work.asks]
        try:
            flight.pending = self._pipeline.submit(flight.work.step, draws)
        except Exception as error:  # as in `_run`
            flight.error = _told(error)
        return Outcome(error=flight.error)

    def _land(self, flight: Flight) -> Outcome:
        try:
            if flight.pending is None:
                return Outcome(guessed=flight.work.guessed, error=flight.error)
            found = flight.pending.result()
            choices = tuple(
                accepted(Sampled(token=token) if sound else None, None)
                for token, sound in zip(found.tokens.tolist(), found.sound.tolist(), strict=True)
            )
        except Exception as error:  # as in `_run`
            return Outcome(guessed=flight.work.guessed, error=_told(error))
        now_s = self._clock()
        began_s, self._landed_s = max(self._landed_s, flight.launched_s), now_s
        return Outcome(choices=choices, guessed=flight.work.guessed, elapsed_s=now_s - began_s)

    async def call(self, work: Callable[[], None]) -> None:
        """Run something else in the thread, where the executor is at rest.

        Raises:
            TidegateError: `work` raised it.
        """
        self._running = self._thread.submit(partial(_quietly, work))
        outcome = await asyncio.shield(self._running)
        if outcome.error is not None:
            raise outcome.error

    async def close(self, timeout_s: float) -> None:
        """Wait for the running step, so that its owner may close the executor afterwards."""
        if self._running is not None and not self._running.done():
            await asyncio.wait({self._running}, timeout=timeout_s)
        self._thread.close()

    def _run(self, work: Work) -> Outcome:
        started_s = self._clock()
        drafts: Sequence[Draft] = ()
        try:
            work, drafts = self._with_guesses(work)
            pick = self._execute(work) if work.step.rows or work.step.copies else no_choices
            executed_s = self._clock() - started_s
            # After the copies of the step, which may be to the same slots, and before choosing:
            # choosing moves guides on, so from there on the step must not fail.
            loaded = work.load()
            started_s = self._clock()
            choices = pick()
            elapsed_s = executed_s + self._clock() - started_s
        except Exception as error:  # the boundary between a backend's libraries and the engine
            return Outcome(guessed=work.guessed, error=_told(error))
        self._learn(work, drafts, choices)
        return Outcome(choices=choices, guessed=work.guessed, elapsed_s=elapsed_s, loaded=loaded)

    def _with_guesses(self, work: Work) -> tuple[Work, Sequence[Draft]]:
        if self._speculator is None or work.guessing is None:
            return work, ()
        drafts = self._speculator.draft(work.guessing)
        return _with_drafts(work, drafts), drafts

    def _execute(self, work: Work) -> Callable[[], tuple[Choice, ...]]:
        """Run the step; what comes back chooses its tokens."""
        if self._sampling is not None and work.asks:
            device = DeviceChoosing(self._sampling, work.asks)
            return partial(device.choices, device.run(self._sampling, work.step))
        result = self._executor.execute(work.step)
        _check(result, work.step, self._executor.limits.vocab)
        return partial(choose, result.logits, work.asks) if work.asks else no_choices

    def _learn(self, work: Work, drafts: Sequence[Draft], choices: Sequence[Choice]) -> None:
        if self._speculator is None or work.guessing is None or not any(work.guessed):
            return
        found = iter(choices)
        held = [max(0, len(next(found).sampled) - 1) if row.logits else 0 for row in work.step.rows]
        self._speculator.observe(work.guessing, drafts, held)


def _with_drafts(work: Work, drafts: Sequence[Draft]) -> Work:
    """The rows with their drafts appended, and logits for every token of them."""
    if not any(draft.tokens for draft in drafts):
        return work
    rows, asks = list(work.step.rows), list(work.asks)
    place = 0
    for index, (row, draft) in enumerate(zip(work.step.rows, drafts, strict=True)):
        if draft.tokens:
            guess = np.array(draft.tokens, np.int64)
            rows[index] = Row(
                tokens=np.concatenate((row.tokens, guess)),
                past=row.past,
                blocks=row.blocks,
                slot=row.slot,
                logits=row.logits + len(guess),
                adapter=row.adapter,
            )
            asks[place] = Ask(draw=asks[place].draw, draft=guess, guide=asks[place].guide)
        place += row.logits
    step = ExecutorStep(rows=tuple(rows), copies=work.step.copies)
    return Work(step=step, asks=tuple(asks), guessing=work.guessing, load=work.load)


def _told(error: Exception) -> TidegateError:
    """What a step failed with: our own error, or one of ours in place of a library's."""
    if isinstance(error, TidegateError):
        _log.warning("a step of the model failed: %s", error)
        return error
    _log.error("a step of the model failed: %s", describe_defect(error))
    lost = ExecutionError(f"a step of the model failed: {type(error).__name__}")
    lost.__cause__ = error
    return lost


def _quietly(work: Callable[[], None]) -> Outcome:
    try:
        work()
    except TidegateError as error:
        return Outcome(error=error)
    except Exception as error:  # as in a step
        _log.error("work beside the steps failed: %s", describe_defect(error))
        return Outcome(
            error=ExecutionError(f"work beside the steps failed: {type(error).__name__}")
        )
    return Outcome()


def _check(result: StepResult, step: ExecutorStep, vocab: int) -> None:
    rows = sum(row.logits for row in step.rows)
    if rows and result.logits.shape != (rows, vocab):
        shape = result.logits.shape
        raise ExecutionError(f"the model gave logits of shape {shape}: must be {(rows, vocab)}")
