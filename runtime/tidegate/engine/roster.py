"""`Roster`: everybody who is in the engine, what a step gave each of them, and how each ends.

Exactly one terminal event per request: there is one way out (`_end`), and with it go the place in
line, the KV and the name. What goes wrong in one request's tokens ends that request alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from tidegate.engine.batch import Batch
from tidegate.engine.batcher import Batcher
from tidegate.engine.choosing import Choice
from tidegate.engine.drafts import Ended
from tidegate.engine.events import Cancelled, Failed, Finished, FinishReason, Terminal
from tidegate.engine.generation import Generation
from tidegate.engine.request import RequestId
from tidegate.engine.snapshot import Meter
from tidegate.engine.speculation import Speculator
from tidegate.engine.stepper import Outcome
from tidegate.errors import RequestError, TidegateError, describe_defect

_log = logging.getLogger(__name__)


class Roster:
    """Used from the engine's event loop, between its steps or while one runs."""

    def __init__(
        self,
        batcher: Batcher,
        meter: Meter,
        *,
        speculator: Speculator | None,
        clock: Callable[[], float],
        ended: Callable[[RequestId], None] | None = None,
    ) -> None:
        """Begin with nobody.

        Args:
            batcher: whose line everybody waits in.
            meter: counts what they got and how they ended.
            speculator: hears of those who ended.
            clock: monotonic seconds.
            ended: hears of everybody who ended, read or not.
        """
        self._batcher, self._meter, self._speculator = batcher, meter, speculator
        self._clock, self._ended = clock, ended
        self._by_id: dict[RequestId, Generation] = {}
        self.nobody = asyncio.Event()
        """Set while nobody is here."""
        self.nobody.set()

    def find(self, request_id: RequestId) -> Generation | None:
        """Who has this id now."""
        return self._by_id.get(request_id)

    def enter(self, generation: Generation) -> None:
        """Put a request in line; its id must be free."""
        self._by_id[generation.request.id] = generation
        self._batcher.add(generation)
        self.nobody.clear()

    def scheduled(self, batch: Batch) -> None:
        """Book who is in a step for the first time."""
        now_s = self._clock()
        for generation in batch.everyone:
            if generation.first_scheduled_s is None:
                generation.first_scheduled_s = now_s
                self._meter.prefix_query_tokens += generation.length
                self._meter.prefix_hit_tokens += generation.cached_tokens or 0

    def absorb(self, batch: Batch, outcome: Outcome) -> None:
        """Hand out the tokens of a step that succeeded."""
        self._meter.stepped(
            prompt_tokens=batch.prefill_tokens,
            rows=len(batch.chunks),
            tokens=sum(len(choice.sampled) for choice in outcome.choices),
            elapsed_s=outcome.elapsed_s,
        )
        taken = zip(batch.samplers, outcome.choices, outcome.guessed, strict=True)
        for generation, choice, guessed in taken:
            if generation.channel.ended:
                continue  # cancelled while the step ran
            try:
                self._advance(generation, choice, guessed)
            except Exception as error:  # the boundary of one request: its text, its sampling
                if not isinstance(error, RequestError):
                    name = generation.request.id
                    _log.error("request %s failed: %s", name, describe_defect(error))
                self._end(generation, _failed(error), forget=True)

    def cancel(self, generation: Generation) -> None:
        """End a request with `Cancelled`, unless it has ended."""
        if not generation.channel.ended:
            self._end(generation, Cancelled(usage=generation.usage()))

    def drop_abandoned(self) -> None:
        """Cancel those whose reader is gone."""
        for generation in self._batcher.everyone():
            if generation.channel.abandoned:
                self.cancel(generation)

    def fail(self, generations: Iterable[Generation], error: Exception) -> None:
        """End these with `Failed`, unless they have ended."""
        for generation in generations:
            if not generation.channel.ended:
                self._end(generation, _failed(error), forget=True)

    def fail_all(self, error: Exception) -> None:
        """End everybody with `Failed`."""
        self.fail(self._batcher.everyone(), error)

    def fail_unbegun(self, error: Exception) -> None:
        """End those that no step has met with `Failed`: another engine can begin them sooner."""
        waiting = [*self._batcher.waiting]  # `fail` takes them out of it
        self.fail((one for one in waiting if one.first_scheduled_s is None), error)

    def _advance(self, generation: Generation, choice: Choice, guessed: int) -> None:
        if choice.error is not None:
            raise choice.error
        accepted = len(choice.sampled) - 1
        if guessed:
            self._meter.guessed(guessed=guessed, accepted=accepted)
            generation.accepted_draft_tokens += accepted
            generation.rejected_draft_tokens += guessed - accepted
        now_s = self._clock()
        if generation.first_token_s is None:
            generation.first_token_s = now_s
        reason: FinishReason | None = None
        for sampled in choice.sampled:
            self._meter.generated_tokens += 1
            reason = generation.accept(sampled, most=self._batcher.context_tokens)
            if reason is not None:
                break
        if accepted:
            self._batcher.keep(generation, accepted)
        if reason is not None:
            self._finish(generation, reason, now_s)

    def _finish(self, generation: Generation, reason: FinishReason, now_s: float) -> None:
        timing = generation.timing(now_s)
        self._meter.served(timing.total_s - timing.first_scheduled_s)
        self._end(generation, Finished(reason=reason, usage=generation.usage(), timing=timing))

    def _end(self, generation: Generation, terminal: Terminal, *, forget: bool = False) -> None:
        """The only way out: the terminal event, the place in line and the KV go together."""
        generation.channel.end(terminal)
        self._meter.ended[type(terminal)] += 1
        del self._by_id[generation.request.id]
        self._batcher.remove(generation, forget=forget)
        self._tell_speculator(generation, finished=isinstance(terminal, Finished))
        if self._batcher.empty:
            self.nobody.set()
        if self._ended is not None:
            self._ended(generation.request.id)

    def _tell_speculator(self, generation: Generation, *, finished: bool) -> None:
        ran = generation.first_scheduled_s is not None
        if self._speculator is None or not generation.request.speculation or not ran:
            return
        self._speculator.ended(
            Ended(
                key=generation.key,
                tokens=generation.tokens,
                prompt_tokens=len(generation.request.prompt),
                shared=generation.request.reuse and finished,
            )
        )


def _failed(error: Exception) -> Failed:
    """What the reader may know: our own errors in full, of others only that there was one."""
    if isinstance(error, TidegateError):
        return Failed(code=error.code, message=str(error), retryable=error.retryable)
    message = f"internal error: {type(error).__name__}"
    return Failed(code=TidegateError.code, message=message, retryable=False)
