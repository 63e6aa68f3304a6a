"""`RayBackend`: engines in other processes as a `Backend`, for HTTP and for a gateway.

A call becomes tokens here and an answer there. If the replica that gives it dies or leaves, another
one runs the call again and goes on where the caller is: answers are greedy or seeded, so they are
the same on every replica of one kind. Only a caller who has a part of an answer that cannot be gone
on with sees an error, and may retry.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, generate_latest

from tidegate.api.admission import CallSize
from tidegate.api.backend import AnswerEvent, Health, ModelCard
from tidegate.api.context_policy import fit_call
from tidegate.api.engine_backend import encode_call, new_request_id, refuse_strays
from tidegate.api.schema import Call
from tidegate.api.wire import read_event
from tidegate.cloud.call_size import most_size
from tidegate.cloud.handler import seeded
from tidegate.cloud.ray.affinity import ANCHOR_BLOCKS, BLOCK_TOKENS, anchor_of
from tidegate.cloud.ray.messages import Ask, ModelFacts, Refusal
from tidegate.cloud.ray.replay import Replay
from tidegate.cloud.ray.replica import Part
from tidegate.engine.events import Cancelled, Failed, Finished
from tidegate.engine.text import TextModel
from tidegate.errors import RequestError, UnavailableError

MOST_RUNS: Final = 4
"""Replicas that one call may lose; a call that kills whoever runs it must not kill them all."""
_PAUSE_S: Final = 0.2
"""Before the first further run, then twice as long each time: a new replica takes seconds."""


class LostReplicaError(UnavailableError):
    """The replica that ran a call is gone."""


class Replicas(Protocol):
    """The engines, wherever they are."""

    def answer(self, ask: Ask) -> AsyncGenerator[Part, None]:
        """Run a call on one of them; closing the generator ends it there.

        Raises:
            CapacityError: too many calls wait already.
            LostReplicaError: the replica is gone; another may be asked.
        """


@dataclass(kw_only=True, slots=True)
class RayCounters:
    """What a front has seen."""

    asked: int = 0
    rerun: int = 0
    """Runs after the first of a call."""
    continued: int = 0
    """Answers that went on in their middle, on another replica."""
    lost: int = 0
    """Calls that were given up."""

    def told(self) -> Mapping[str, tuple[int, str]]:
        """Each count with what it is."""
        return {
            "asked": (self.asked, "Calls that fronts asked replicas."),
            "rerun": (self.rerun, "Runs of calls after the first, as a replica was lost."),
            "continued": (self.continued, "Answers that went on in their middle elsewhere."),
            "lost": (self.lost, "Calls that were given up, as all their replicas were lost."),
        }


class RayBackend:
    """`tidegate.api.backend.Backend`, and what a gateway's handler asks."""

    def __init__(
        self,
        replicas: Replicas,
        text: TextModel,
        facts: ModelFacts,
        *,
        numbers: Callable[[], Awaitable[Mapping[str, object]]] | None = None,
        anchor_blocks: int = ANCHOR_BLOCKS,
        pause_s: float = _PAUSE_S,
    ) -> None:
        """Ask `replicas`.

        Args:
            replicas: the engines.
            text: the model's text side, as theirs.
            facts: of the model.
            numbers: for `/status`.
            anchor_blocks: of a prompt, which say where it is sent.
            pause_s: before a call is run again.
        """
        self._replicas, self._text, self._facts = replicas, text, facts
        self._numbers, self._pause_s = numbers, pause_s
        self._anchor_blocks = anchor_blocks
        self.counters = RayCounters()
        self.accepting = True
        """False once the process is to end."""

    async def text_of(self, model: str) -> TextModel:
        """The text side of the one model; see `tidegate.api.tokens.TextOf`."""
        assert model == self._facts.model_id, "one of `models`"
        return self._text

    def models(self) -> tuple[ModelCard, ...]:
        """See `Backend.models`."""
        facts = self._facts
        return (
            ModelCard(
                id=facts.model_id,
                created_s=facts.created_s,
                context_tokens=facts.context_tokens,
            ),
        )

    async def answer(self, call: Call) -> AsyncIterator[AnswerEvent]:
        """See `Backend.answer`."""
        async with aclosing(self.answer_as(call, new_request_id())) as events:
            async for event in events:
                yield event

    async def answer_as(
        self, call: Call, request_id: str, *, join_unread: bool = True
    ) -> AsyncGenerator[AnswerEvent, None]:
        """Answer a call under an id that was given to it elsewhere; every token is an event.

        Raises:
            RequestError: the call names another model, or its prompt does not fit.
            CapacityError: too many calls wait already.
            UnavailableError: no replica could be reached.
        """
        if call.model not in (None, self._facts.model_id):
            raise RequestError("model", f"must be {self._facts.model_id!r}", status=404)
        refuse_strays(call)
        fitted = await fit_call(
            call,
            partial(encode_call, self._text),
            self._text,
            policy=call.options.context_policy or "error",
            context_tokens=self._facts.context_tokens,
        )
        ask = Ask(
            call=seeded(fitted.call, bytes.fromhex(request_id)),
            prompt=fitted.prompt,
            request_id=request_id,
            anchor=anchor_of(
                fitted.prompt,
                block_tokens=self._facts.block_tokens or BLOCK_TOKENS,
                anchor_blocks=self._anchor_blocks,
            ),
        )
        async with aclosing(self._runs(ask)) as events:
            async for event in events:
                yield fitted.told(event)

    async def _runs(self, ask: Ask) -> AsyncGenerator[AnswerEvent, None]:
        """The answer, over as many runs as it takes."""
        self.counters.asked += 1
        replay, began_s = Replay(), time.monotonic()
        for run in range(MOST_RUNS):
            if run:
                self.counters.rerun += 1
                self.counters.continued += replay.given > 1
                await asyncio.sleep(self._pause_s * 2 ** (run - 1))
            replay.begin()
            try:
                async with aclosing(self._run(_later(ask, began_s), replay)) as events:
                    async for event in events:
                        yield event
                return
            except LostReplicaError as error:
                lost = error
        self.counters.lost += 1
        raise UnavailableError(f"{MOST_RUNS} replicas were lost under this call") from lost

    async def _run(self, ask: Ask, replay: Replay) -> AsyncGenerator[AnswerEvent, None]:
        """What is new in one run; ends with the answer's terminal event.

        Raises:
            LostReplicaError: it ended without one.
        """
        async with aclosing(self._replicas.answer(ask)) as parts:
            async for part in parts:
                if isinstance(part, Refusal):
                    if part.kind == "unavailable":
                        raise LostReplicaError(part.message)
                    raise part.error()
                for payload in part:
                    event = read_event(payload)
                    if isinstance(event, Failed) and event.code == UnavailableError.code:
                        raise LostReplicaError(event.message)
                    if isinstance(event, Finished | Failed | Cancelled):
                        replay.end()
                        yield event
                        return
                    if replay.is_new(payload):
                        yield event
        raise LostReplicaError("the answer broke off without an end")

    async def size_of(self, call: Call) -> CallSize:
        """See `Sizing.size_of`."""
        facts = self._facts
        model = call.model or facts.model_id
        return await most_size(call, model, self._text, facts.context_tokens)

    def health(self) -> Health:
        """See `Backend.health`; that of the engines is for those who replace them."""
        asked = f"{self.counters.asked} asked, {self.counters.rerun} run again"
        return Health(healthy=True, ready=self.accepting, detail=asked)

    async def status(self) -> Mapping[str, object]:
        """See `Backend.status`: this front, and one of the replicas."""
        replica = None if self._numbers is None else dict(await self._numbers())
        return {"model": self._facts.model_id, "front": asdict(self.counters), "replica": replica}

    def metrics(self) -> bytes:
        """See `Backend.metrics`."""
        registry = CollectorRegistry()
        for name, (count, what) in self.counters.told().items():
            Counter(f"tidegate_ray_{name}", what, registry=registry).inc(count)
        return generate_latest(registry)


def _later(ask: Ask, began_s: float) -> Ask:
    """The same call at a later run: less of its deadline is left."""
    options = ask.call.options
    if options.deadline_ms is None:
        return ask
    passed_ms = int(1000 * (time.monotonic() - began_s))
    left = replace(options, deadline_ms=max(1, options.deadline_ms - passed_ms))
    return replace(ask, call=replace(ask.call, options=left))
