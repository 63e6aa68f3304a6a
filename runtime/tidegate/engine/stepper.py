"""`Stepper`: the one thread in which the executor runs and its logits become tokens.

Sampling stays off the event loop too: top-p over a large vocabulary takes milliseconds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tidegate.engine.choosing import Ask, Choice, choose
from tidegate.engine.executor import Executor, ExecutorStep, StepResult
from tidegate.errors import ExecutionError, TidegateError, describe_defect

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a step: a choice per ask, or an error."""

    choices: tuple[Choice, ...] = ()
    error: TidegateError | None = None
    elapsed_s: float = 0.0
    """Of the rows, choosing included."""
    loaded: tuple[int, ...] = ()
    """What the loads returned."""


def no_loads() -> tuple[int, ...]:
    """For a step that loads nothing."""
    return ()


class Stepper:
    """Runs one step at a time. `close` lets a running step end, but only for so long."""

    def __init__(self, executor: Executor, clock: Callable[[], float] = time.monotonic) -> None:
        self._executor = executor
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tidegate-step")
        self._running: asyncio.Future[Outcome] | None = None

    async def run(
        self,
        step: ExecutorStep,
        asks: tuple[Ask, ...],
        load: Callable[[], tuple[int, ...]] = no_loads,
    ) -> Outcome:
        """Run a step, then its loads, in the thread.

        Errors come back as an outcome, never as an exception.
        """
        loop = asyncio.get_running_loop()
        self._running = loop.run_in_executor(self._thread, self._run, step, asks, load)
        # A step can not be interrupted: cancelling the loop must not lose sight of it.
        return await asyncio.shield(self._running)

    async def call(self, work: Callable[[], None]) -> None:
        """Run something else in the thread, where the executor is at rest.

        Raises:
            TidegateError: `work` raised it.
        """
        loop = asyncio.get_running_loop()
        self._running = loop.run_in_executor(self._thread, _quietly, work)
        outcome = await asyncio.shield(self._running)
        if outcome.error is not None:
            raise outcome.error

    async def close(self, timeout_s: float) -> None:
        """Wait for the running step, so that its owner may close the executor afterwards."""
        if self._running is not None and not self._running.done():
            await asyncio.wait({self._running}, timeout=timeout_s)
        self._thread.shutdown(wait=False)

    def _run(
        self, step: ExecutorStep, asks: tuple[Ask, ...], load: Callable[[], tuple[int, ...]]
    ) -> Outcome:
        started_s = self._clock()
        try:
            choices = self._execute(step, asks) if step.rows or step.copies else ()
            elapsed_s = self._clock() - started_s
            loaded = load()  # after the copies of the step: they may be to the same slots
        except TidegateError as error:
            _log.warning("a step of the model failed: %s", error)
            return Outcome(error=error)
        except Exception as error:  # the boundary between a backend's libraries and the engine
            _log.error("a step of the model failed: %s", describe_defect(error))
            lost = ExecutionError(f"a step of the model failed: {type(error).__name__}")
            lost.__cause__ = error
            return Outcome(error=lost)
        return Outcome(choices=choices, elapsed_s=elapsed_s, loaded=loaded)

    def _execute(self, step: ExecutorStep, asks: tuple[Ask, ...]) -> tuple[Choice, ...]:
        result = self._executor.execute(step)
        _check(result, step, self._executor.limits.vocab)
        return choose(result.logits, asks) if asks else ()


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
