"""`Engine`: the loop. Plan, execute, hand out tokens; one terminal event per request, always.

`run()` owns the loop and ends by cancellation. Everything else is called from the same event loop.
A request that is wrong, fails or goes away ends alone; a step that fails is tried again in parts
until it is clear who failed it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from tidegate.engine.adapting import Adapting
from tidegate.engine.admission import check_line, check_request
from tidegate.engine.answer import Answer
from tidegate.engine.batch import Batch
from tidegate.engine.batcher import Batcher
from tidegate.engine.drafts import Drafter, PaidDrafter
from tidegate.engine.events import Cancelled, Failed, Finished
from tidegate.engine.executor import Executor, Unloadable
from tidegate.engine.facts import Described
from tidegate.engine.generation import Generation
from tidegate.engine.grammar import Grammars
from tidegate.engine.prefix_disk import DiskPrefixes
from tidegate.engine.request import Constraint, GenerationRequest, RequestId
from tidegate.engine.roster import Roster
from tidegate.engine.settings import EngineSettings
from tidegate.engine.snapshot import EngineSnapshot, Meter
from tidegate.engine.speculation_of_settings import speculator_for
from tidegate.engine.stepper import Outcome, Stepper, Work
from tidegate.engine.steps import StepWatcher, report_of
from tidegate.engine.text import TextModel
from tidegate.errors import (
    RequestError,
    TidegateError,
    UnavailableError,
    describe_defect,
)

_log = logging.getLogger(__name__)

_MOST_FAILED_STEPS = 16
"""In a row, and the executor itself is broken; finding one culprit among 256 takes 9."""
_LAST_COPIES_S = 5.0
"""For the prefixes that still wait for the disk tier when all requests have ended."""
_WRITER_WAIT_S = 0.05
"""Between two looks at whether the disk has caught up."""
_LOADING_PATIENCE = 10
"""Times as long as a step may take before the engine counts as stuck, for a model that comes back:
on a machine with other work 1.1 B weights took a minute instead of three seconds."""


class Engine:
    """Runs requests on one executor. The executor belongs to whoever made it."""

    def __init__(
        self,
        executor: Executor,
        text: TextModel,
        *,
        model_id: str,
        settings: EngineSettings | None = None,
        disk: DiskPrefixes | None = None,
        drafters: Sequence[Drafter] | None = None,
        draft_model: PaidDrafter | None = None,
        watcher: StepWatcher | None = None,
        ended: Callable[[RequestId], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Size everything; nothing runs until `run()`.

        Args:
            executor: its KV and limits are all there is; nothing is allocated later.
            text: the same model's tokenizer.
            model_id: for people.
            settings: None for the defaults.
            disk: where prefixes survive; None to keep them in KV memory only.
            drafters: who guesses tokens ahead, the first with an idea; None for what
                a grammar leaves no choice about and prompt lookup.
            draft_model: who guesses at a price where they have none.
            watcher: told of every step.
            ended: told of every request that has ended, however slowly its answer is read; quick.
            clock: monotonic seconds; deadlines are on it.
        """
        self.model_id = model_id
        self.text = text
        self.clock = clock
        self._settings = settings or EngineSettings()
        self._disk = disk if self._settings.prefix_reuse else None
        self._draft_model = draft_model
        self._watcher = watcher
        self._batcher = Batcher(executor, self._settings, self._disk)
        self._speculator = speculator_for(
            executor.limits.step_rows,
            self._settings,
            eos_ids=text.eos_ids,
            drafters=drafters,
            paid=draft_model,
        )
        self._stepper = Stepper(executor, self._speculator, clock)
        self.executor_facts = executor.facts if isinstance(executor, Described) else None
        self._unloadable = executor if isinstance(executor, Unloadable) else None
        self._vocab = executor.limits.vocab
        self._adapts = isinstance(executor, Adapting) and self._disk is None
        self._grammars = Grammars(text, vocab=self._vocab)
        self.context_tokens = self._batcher.context_tokens
        self._arrivals = 0
        self._meter = Meter(last_progress_s=clock())
        self._roster = Roster(
            self._batcher, self._meter, speculator=self._speculator, clock=clock, ended=ended
        )
        self._accepting = True
        self._stopped = False
        self._work = asyncio.Event()

    async def prepare(self, constraint: Constraint | None) -> None:
        """Compile what a request is constrained by; it may be submitted right after.

        Raises:
            RequestError: the constraint is wrong; the message says where.
            CapacityError: too many grammars are being compiled.
        """
        if constraint is not None:
            await self._grammars.prepare(constraint)

    def submit(self, request: GenerationRequest, *, join_unread: bool = True) -> Answer:
        """Put a request in line. Closing or dropping the answer aborts it.

        Args:
            request: what to answer; its constraint must be prepared.
            join_unread: text that nobody has read yet becomes one delta; otherwise every token's
                text stays an event of its own, the same at every run of the same request.

        Raises:
            RequestError: it can never run here; the message names the limit.
            CapacityError: the line is full.
            UnavailableError: the engine is draining or stopped.
        """
        self._check(request)
        constraint = request.constraint
        generation = Generation(
            request,
            key=self._arrivals,
            text=self.text.detokeniser(visible=request.visible),
            eos_ids=self.text.eos_ids,
            now_s=self.clock(),
            join_unread=join_unread,
            guide=None if constraint is None else self._grammars.guide(constraint),
        )
        self._arrivals += 1
        if self._batcher.empty:
            self._meter.last_progress_s = self.clock()
        self._roster.enter(generation)
        self._work.set()
        return Answer(generation.channel, partial(self._roster.cancel, generation))

    def cancel(self, request_id: RequestId) -> bool:
        """End a request with `Cancelled`; False when it is not here (any more)."""
        generation = self._roster.find(request_id)
        if generation is not None:
            self._roster.cancel(generation)
        return generation is not None

    async def run(self) -> None:
        """Serve until cancelled; requests still here then end with a retryable `Failed`."""
        try:
            while True:
                await self._wait_for_work()
                self._roster.drop_abandoned()
                if not self._batcher.empty:
                    await self._step_safely()
                elif not await self._spill(idle=True):
                    self._work.clear()
        finally:
            self._accepting, self._stopped = False, True
            self._roster.fail_all(UnavailableError("the engine has stopped"))
            await self._stepper.close(self._settings.stall_after_s)
            self._batcher.abandon_step()
            self._grammars.close()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and those that still wait, and let what has begun finish.

        Returns:
            False when `timeout_s` was not enough; what was left then failed, to be retried.
        """
        self._accepting = False
        self._roster.fail_unbegun(UnavailableError("the engine is shutting down"))
        try:
            async with asyncio.timeout(timeout_s):
                await self._roster.nobody.wait()
        except TimeoutError:
            self._roster.fail_all(UnavailableError("the engine shuts down"))
            return False
        if self._disk is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(timeout_s, _LAST_COPIES_S)):
                    await self._disk.settled.wait()
        return True

    def snapshot(self) -> EngineSnapshot:
        """The engine in numbers; cheap, changes nothing."""
        meter, kv, batcher = self._meter, self._batcher.kv, self._batcher
        loaded = self._unloadable is None or self._unloadable.loaded
        patience_s = self._settings.stall_after_s * (1 if loaded else _LOADING_PATIENCE)
        stalled = self.clock() - meter.last_progress_s > patience_s
        sound = meter.failed_in_a_row < _MOST_FAILED_STEPS and (batcher.empty or not stalled)
        return EngineSnapshot(
            running=len(batcher.running),
            waiting=len(batcher.waiting),
            kv_usage=1 - kv.free / kv.units,
            prefix_query_tokens=meter.prefix_query_tokens,
            prefix_hit_tokens=meter.prefix_hit_tokens,
            preemptions=meter.preemptions,
            prompt_tokens=meter.prompt_tokens,
            generated_tokens=meter.generated_tokens,
            drafts=meter.drafts,
            draft_tokens=meter.draft_tokens,
            accepted_draft_tokens=meter.accepted_draft_tokens,
            finished=meter.ended[Finished],
            failed=meter.ended[Failed],
            cancelled=meter.ended[Cancelled],
            steps=meter.steps,
            prefill_tokens_per_s=meter.prefill_tokens_per_s,
            decode_step_s=meter.decode_step_s,
            request_s=meter.request_s,
            last_progress_s=meter.last_progress_s,
            failed_steps=meter.failed_steps,
            healthy=sound and not self._stopped,
            accepting=self._accepting,
            loaded=loaded,
            disk_hit_tokens=0 if self._disk is None else self._disk.hit_tokens,
            disk=None if self._disk is None else self._disk.numbers(),
            kv_units=kv.units,
            kv_unit_tokens=kv.unit_tokens,
            step_tokens=tuple(meter.step_tokens),
            tokens_of_steps=meter.tokens_of_steps,
            accepted_lengths=tuple(meter.accepted_lengths),
        )

    def _check(self, request: GenerationRequest) -> None:
        if not self._accepting:
            raise UnavailableError("the engine is shutting down")
        if self._roster.find(request.id) is not None:
            raise RequestError("request_id", f"{request.id!r} is already running: must be unique")
        check_request(
            request, vocab=self._vocab, context_tokens=self.context_tokens, adapts=self._adapts
        )
        check_line(
            len(request.prompt),
            [one.length for one in self._batcher.waiting],
            most_waiting=self._settings.most_waiting,
            context_tokens=self.context_tokens,
            request_s=self._meter.request_s,
        )

    async def _step_safely(self) -> None:
        """One step; a defect of our own costs the requests it met, never the loop."""
        try:
            await self._step()
        except Exception as error:  # the pass boundary of the loop
            _log.error("the engine failed in a step: %s", describe_defect(error))
            self._batcher.abandon_step()
            met = tuple(self._batcher.running.values()) or self._batcher.everyone()
            self._roster.fail(met, TidegateError("internal error in the engine"))

    async def _step(self) -> None:
        began_s = self.clock()
        speculator = self._speculator
        batch = self._batcher.next(guess=self._may_guess())
        self._meter.preemptions += batch.preempted
        if not batch.everyone:
            made_way = batch.preempted or self._disk is not None
            assert made_way, "with work there is a step or room is made for one"
            await asyncio.sleep(0)
            return
        self._roster.scheduled(batch)
        if self._stepper.pipelines and self._batcher.foreseeable(batch):
            await self._run_ahead(batch)
            return
        outcome = await self._stepper.run(self._work_of(batch))
        if not self._finish(batch, outcome, began_s):
            return
        if speculator is not None and batch.guessing is not None:
            speculator.timed(self.clock() - began_s)
        await self._spill(idle=False)

    def _may_guess(self) -> bool:
        if self._speculator is None:
            return False
        few = len(self._batcher.running) <= self._settings.most_guessing
        return (few or not self._stepper.pipelines) and not self._speculator.rests()

    def _work_of(self, batch: Batch) -> Work:
        return Work(
            step=batch.step,
            asks=batch.asks(),
            guessing=batch.guessing,
            load=partial(self._load, batch),
        )

    async def _run_ahead(self, batch: Batch) -> None:
        """Run a step, and plan each next one while one runs, until one cannot be foreseen."""
        began_s = self.clock()
        flight = self._stepper.launch(self._work_of(batch))
        while True:
            following, behind = self._batcher.next_behind(), None
            if following is not None:
                self._roster.scheduled(following)
                behind = self._stepper.launch(self._work_of(following))
            finished = self._finish(batch, await self._stepper.land(flight), began_s)
            began_s = self.clock()
            if following is None or behind is None:
                return
            if not finished:
                # It ran on what the failed one left behind.
                await self._stepper.land(behind)
                self._batcher.withdraw(following)
                return
            self._roster.drop_abandoned()
            batch, flight = following, behind

    def _finish(self, batch: Batch, outcome: Outcome, began_s: float) -> bool:
        """Book what a step gave and hand out its tokens; False when it failed."""
        now_s = self._meter.last_progress_s = self.clock()
        if self._watcher is not None:
            self._watcher(report_of(batch, outcome, began_s=began_s, ended_s=now_s))
        if isinstance(outcome.error, UnavailableError):
            # There is no model to run on: nobody in the batch is to blame, and all may come again.
            self._batcher.settle_failed(batch, guessed=any(outcome.guessed))
            self._roster.fail_all(outcome.error)
            return False
        if outcome.error is not None:
            self._meter.failed()
            given_up = self._batcher.settle_failed(batch, guessed=any(outcome.guessed))
            self._roster.fail(given_up, outcome.error)
            return False
        cached = batch.cached_tokens
        self._batcher.settle(batch, outcome.loaded)
        self._meter.prefix_hit_tokens += batch.cached_tokens - cached
        self._roster.absorb(batch, outcome)
        self._batcher.clear_guesses(batch)
        self._batcher.clear_suspects(batch)
        return True

    async def _wait_for_work(self) -> None:
        """Sleep until there is some; unload the model when that takes long."""
        grace_s, model = self._settings.unload_after_s, self._unloadable
        if grace_s is None or model is None or not model.loaded:
            await self._work.wait()
            return
        try:
            # Not `wait_for`, which in Python 3.11 can lose a cancellation that comes with the work.
            async with asyncio.timeout(grace_s):
                await self._work.wait()
        except TimeoutError:
            self._batcher.forget_kv()
            try:
                await self._stepper.call(partial(self._unload, model))
            except TidegateError as error:
                _log.error("the model could not be unloaded: %s", error)
                return
            _log.info("the model is unloaded after %g s without work", grace_s)

    def _unload(self, model: Unloadable) -> None:
        """Both models; on the thread of the steps."""
        model.unload()
        if self._draft_model is not None:
            self._draft_model.unload()

    def _load(self, batch: Batch) -> tuple[int, ...]:
        """The units of each load that were there; on the thread of the steps."""
        return tuple(self._disk.load(copies) for _, copies in batch.loads if self._disk is not None)

    async def _spill(self, *, idle: bool) -> bool:
        """Copy a few units out to the disk tier; False when there is nothing to copy."""
        if self._disk is None or self._disk.settled.is_set():
            return False
        copies = self._disk.spills(self._batcher.kv, idle=idle)
        if copies:
            try:
                await self._stepper.call(partial(self._disk.save, copies))
            except TidegateError as error:
                _log.warning("a prefix was not kept: %s", error)
        elif idle and not self._disk.settled.is_set():  # as much as may is waiting to be written
            with suppress(TimeoutError):
                self._work.clear()
                async with asyncio.timeout(_WRITER_WAIT_S):
                    await self._work.wait()
            self._work.set()
        return True
