"""`EdgeBackend`: the device's answer to a call. Cache, then the router's choice, then the stream.

A call that went to the cloud and got nothing back falls back to the device when it fits there;
one that began to stream is never started over, so no text comes twice.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from tidegate.api.backend import AnswerEvent, Health, ModelCard, Route, Routed
from tidegate.api.context_policy import Fitted, fit_call
from tidegate.api.engine_backend import EngineBackend, encode_call, fit_sampling
from tidegate.api.schema import Call, ContextPolicy
from tidegate.edge.answer_memory import AnswerMemory, replayed
from tidegate.edge.cloud_leg import CloudLeg
from tidegate.edge.energy.governor import Governor
from tidegate.edge.explaining import explanation
from tidegate.edge.governed import Governed, Work
from tidegate.edge.handoff import (
    can_be_continued,
    continuation,
    joined,
    names_tokens,
    shifted,
    was_cut_short,
)
from tidegate.edge.residency import resident_bytes
from tidegate.edge.router import (
    CloudSignals,
    Decision,
    EdgeSignals,
    RouteRequest,
    can_leave,
    decide,
    may_ever_leave,
    refusal_of,
)
from tidegate.engine.events import Finished, TextDelta
from tidegate.engine.request import SamplingParams
from tidegate.engine.text import TextModel
from tidegate.errors import (
    CapacityError,
    ExecutionError,
    LinkError,
    RequestError,
    TidegateError,
    UnavailableError,
)
from tidegate.link.envelope import new_request_id

NO_CLOUD = CloudSignals(
    reachable=False, context_tokens=2**31, answer_s=None, detail="not set up", is_set_up=False
)

_FIRST_GUESS_TOKENS = 64.0
"""Length of an answer before any was seen; the smoothed mean replaces it within a few."""
_WEIGHT = 0.2
_ASKED_AGAIN = "asked again: its answer was on its way from the cloud"


class EdgeBackend:
    """See `tidegate.api.backend.Backend`."""

    def __init__(
        self,
        local: EngineBackend,
        *,
        cloud: CloudLeg | None,
        memory: AnswerMemory,
        batch_rows: int,
        queue_limit: int,
        context_policy: ContextPolicy = "error",
        needed_bytes: Mapping[str, int] | None = None,
        governor: Governor | None = None,
    ) -> None:
        """Serve from `local`, `memory` and, when there is one, `cloud`.

        Args:
            local: the device's engine. Its text model must take prompts as long as the cloud's.
            cloud: None for a device without a link.
            memory: of whole answers.
            batch_rows: requests that the engine runs at once.
            queue_limit: waiting requests beyond which new ones overflow or are refused.
            context_policy: for calls that do not name one; with `error` a prompt that is too long
                for the device may still go to the cloud.
            needed_bytes: the sum that the device was sized by, part by part, for `/status`.
            governor: schedules by energy what the filters leave open; None: the clock decides.
        """
        self._local, self._cloud, self._memory = local, cloud, memory
        self._batch_rows, self._queue_limit = batch_rows, queue_limit
        self._context_policy, self._needed_bytes = context_policy, needed_bytes
        self._governed = Governed(governor)
        self._typical_answer_tokens = _FIRST_GUESS_TOKENS
        self._pending_tokens: dict[str, float] = {}
        self._routes: Counter[Route] = Counter()
        self._refused = self._fallbacks = self._handoffs = 0

    def models(self) -> tuple[ModelCard, ...]:
        """See `Backend.models`."""
        return self._local.models()

    async def text_of(self, model: str) -> TextModel:
        """See `EngineBackend.text_of`."""
        return await self._local.text_of(model)

    async def answer(self, call: Call) -> AsyncIterator[AnswerEvent]:
        """See `Backend.answer`."""
        fitted = await self._fitted(call)
        work = await self._work(fitted)
        with self._governed.serving(work):
            async with aclosing(self._routed(work)) as events:
                async for event in events:
                    if isinstance(event, Routed):
                        self._routes[event.route] += 1
                    yield fitted.told(event)

    async def explain(self, call: Call) -> Mapping[str, object]:
        """See `tidegate.api.backend.Explaining`."""
        work = await self._work(await self._fitted(call), to_answer=False)
        cloud, edge = await self._cloud_signals(), self._signals(work)
        request = self._route_request(work)
        ask = work.ask(may_leave=may_ever_leave(request, cloud))
        return explanation(work.recall, request, edge, cloud, self._governed.governor, ask)

    async def _work(self, fitted: Fitted, *, to_answer: bool = True) -> Work:
        call, prompt = fitted.call, fitted.prompt
        sampling = fit_sampling(call.sampling, len(prompt), self._local.engine.context_tokens)
        arrived_s, model = self._local.engine.clock(), self.models()[0].id
        recall = await self._memory.recall(call, model, prompt, sampling, to_answer=to_answer)
        return Work(
            call=call,
            prompt=prompt,
            request_id=new_request_id(time.time_ns() // 1_000_000).hex(),
            recall=recall,
            answer_tokens=self._expected_tokens(call, sampling),
            sampling=sampling,
            arrived_s=arrived_s,
        )

    async def _fitted(self, call: Call) -> Fitted:
        """The call with a prompt for this device; one that asked for the cloud is fitted there.

        Raises:
            RequestError: the call names another model, or its prompt is too long.
        """
        model = self.models()[0].id
        if call.model not in (None, model):
            raise RequestError("model", f"must be {model!r}", status=404)
        engine, options = self._local.engine, call.options
        policy = options.context_policy or self._context_policy
        return await fit_call(
            call,
            partial(encode_call, engine.text),
            engine.text,
            policy="error" if options.route == "cloud" else policy,
            context_tokens=engine.context_tokens,
        )

    async def _routed(self, work: Work) -> AsyncGenerator[AnswerEvent, None]:
        if work.recall.hit is not None:
            for event in replayed(work.recall, work.request_id, self.models()[0].id):
                yield event
            return
        if self._cloud is not None and await self._cloud.holds(work.call):
            async with aclosing(self._cloud_or_edge(work, _ASKED_AGAIN)) as events:
                async for event in events:
                    yield event
            return
        decision = await self._place(work)
        if decision.place == "edge":
            begun = False
            try:
                async with aclosing(self._edge(work, decision.reason)) as events:
                    async for event in events:
                        begun = True
                        yield event
                return
            except CapacityError:
                if begun:
                    raise
            # The engine's line is bounded in tokens too: full is full, so decide once more.
            decision = await self._decide(work, lines=0)
        if decision.place == "refuse":
            self._refused += 1
            raise refusal_of(decision)
        async with aclosing(self._cloud_or_edge(work, decision.reason)) as events:
            async for event in events:
                yield event

    def _expected_tokens(self, call: Call, fitted: SamplingParams) -> float:
        """How long the answer will be: what past ones were, within what was asked for."""
        if fitted.ignore_eos:
            asked = call.sampling if call.max_tokens_given else fitted
            return float(asked.max_tokens)
        return min(float(call.sampling.max_tokens), self._typical_answer_tokens)

    async def _place(self, work: Work) -> Decision:
        """The router's choice; where it is not forced and there is a governor, the governor's.

        Work that may wait is told its place long after it was asked.
        """
        decision = await self._decide(work)
        if not self._governed.decides or decision.place == "refuse" or decision.forced:
            return decision
        may_leave = may_ever_leave(self._route_request(work), await self._cloud_signals())
        self._pending_tokens[work.request_id] = work.answer_tokens
        try:
            placement = await self._governed.place(work, may_leave=may_leave)
        finally:
            self._pending_tokens.pop(work.request_id, None)
        if placement is None:
            return await self._decide(work, lines=2)
        return replace(decision, place=placement.place, reason=placement.reason)

    async def _cloud_signals(self) -> CloudSignals:
        signals = NO_CLOUD if self._cloud is None else await self._cloud.signals()
        self._governed.see_link(signals.reachable)
        return signals

    async def _decide(self, work: Work, *, lines: int = 1) -> Decision:
        """The router's choice; who had a place in the governor's line has one in the engine's."""
        request = self._route_request(work)
        cloud = await self._cloud_signals()
        limit = lines * self._queue_limit
        return decide(request, replace(self._signals(work), queue_limit=limit), cloud)

    def _route_request(self, work: Work) -> RouteRequest:
        options = work.call.options
        return RouteRequest(
            prompt_tokens=len(work.prompt),
            answer_tokens=work.answer_tokens,
            wish=options.route,
            privacy=options.privacy,
            deadline_s=None if options.deadline_ms is None else options.deadline_ms / 1000,
            token_ids=names_tokens(work.call),
        )

    def _signals(self, work: Work) -> EdgeSignals:
        now = self._local.engine.snapshot()
        return EdgeSignals(
            healthy=now.healthy,
            context_tokens=self._local.engine.context_tokens,
            running=now.running,
            waiting=now.waiting + self._governed.held_before(work),
            batch_rows=self._batch_rows,
            queue_limit=self._queue_limit,
            prefill_tokens_per_s=now.prefill_tokens_per_s,
            decode_step_s=now.decode_step_s,
            pending_tokens=sum(self._pending_tokens.values()),
        )

    async def _edge(self, work: Work, reason: str) -> AsyncGenerator[AnswerEvent, None]:
        """Run on the device, and remember what came out."""
        texts: list[str] = []
        self._governed.begin(work)
        answer = self._local.generate(work.call, work.prompt, work.request_id, reason)
        self._pending_tokens[work.request_id] = work.answer_tokens
        try:
            async with aclosing(answer) as events:
                async for event in events:
                    if isinstance(event, TextDelta):
                        texts.append(event.text)
                        self._count_down(work.request_id, len(event.tokens))
                    elif isinstance(event, Finished):
                        event = await self._governed.ended_here(work, event)
                        text = "".join(texts)
                        cut = was_cut_short(work.call, event, self._local.engine.context_tokens)
                        if cut and await self._can_continue(work):
                            async for later in self._continued(work, text, event):
                                yield later
                            return
                        self._learn(event.usage.completion_tokens)
                        self._governed.learn(work, event)
                        if not cut:
                            self._memory.keep(work.recall, text, event.reason, event.usage)
                    yield event
        finally:
            del self._pending_tokens[work.request_id]

    async def _can_continue(self, work: Work) -> bool:
        """Whether the cloud may and can go on with an answer that fills the device's context."""
        if self._cloud is None or not can_be_continued(work.call):
            return False
        context = self._local.engine.context_tokens
        route = self._route_request(work)
        return can_leave(replace(route, prompt_tokens=context), await self._cloud_signals())

    async def _continued(
        self, work: Work, text: str, end: Finished
    ) -> AsyncGenerator[AnswerEvent, None]:
        """The rest of an answer from the cloud; the cut answer as it is when nothing comes."""
        assert self._cloud is not None
        context = self._local.engine.context_tokens
        reason = f"continued in the cloud: the device's {context} tokens are full"
        call = replace(continuation(work.call, text, end.usage), retry_key=None)
        begun = False
        # A request of its own on the link: the id of the answer stays the same for the caller.
        link_id = new_request_id(time.time_ns() // 1_000_000).hex()
        try:
            async with aclosing(self._cloud.answer(call, link_id, reason)) as events:
                async for event in events:
                    begun = True
                    if isinstance(event, Routed):
                        self._handoffs += 1
                        event = replace(event, request_id=work.request_id)
                    elif isinstance(event, TextDelta):
                        event = shifted(event, len(text))
                    elif isinstance(event, Finished):
                        sent = end.usage.prompt_tokens + end.usage.completion_tokens
                        rest = self._governed.ended_away(work, event, sent_tokens=sent)
                        event = joined(end, rest)
                    yield event
        except TidegateError:
            if begun:
                raise
            yield end

    def _count_down(self, request_id: str, tokens: int) -> None:
        """An answer that is longer than expected is expected to end any moment."""
        rest = self._pending_tokens[request_id] - tokens
        self._pending_tokens[request_id] = max(1.0, rest)

    def _learn(self, answer_tokens: int) -> None:
        old = self._typical_answer_tokens
        self._typical_answer_tokens = (1 - _WEIGHT) * old + _WEIGHT * answer_tokens

    async def _cloud_or_edge(self, work: Work, reason: str) -> AsyncGenerator[AnswerEvent, None]:
        """Run in the cloud; if nothing at all comes back, on the device when it fits there."""
        assert self._cloud is not None, "the router chose a cloud that there is"
        self._governed.depart(work)
        begun = False
        try:
            async with aclosing(self._cloud.answer(work.call, work.request_id, reason)) as events:
                async for event in events:
                    begun = True
                    if isinstance(event, Finished):
                        event = self._governed.ended_away(work, event)
                        self._governed.learn(work, event)
                    yield event
            return
        except (RequestError, UnavailableError, CapacityError, ExecutionError, LinkError) as error:
            if begun or not self._fits_here(work):
                raise
            reason = f"fallback: {error}"
        self._fallbacks += 1
        async with aclosing(self._edge(work, reason)) as events:
            async for event in events:
                yield event

    def _fits_here(self, work: Work) -> bool:
        fits = len(work.prompt) < self._local.engine.context_tokens
        return fits and work.call.options.route != "cloud"

    def health(self) -> Health:
        """See `Backend.health`."""
        return self._local.health()

    async def status(self) -> Mapping[str, object]:
        """See `Backend.status`."""
        return {
            "engine": await self._local.status(),
            "routes": dict(self._routes),
            "refused": self._refused,
            "fallbacks": self._fallbacks,
            "handoffs": self._handoffs,
            "typical_answer_tokens": round(self._typical_answer_tokens, 1),
            "answer_cache": self._memory.status(),
            "memory": {"needed_bytes": self._needed_bytes, "resident_bytes": resident_bytes()},
            "link": None if self._cloud is None else await self._cloud.status(),
            "energy": self._governed.status(),
        }

    def metrics(self) -> bytes:
        """See `Backend.metrics`."""
        link = b"" if self._cloud is None else self._cloud.metrics()
        return self._local.metrics() + link + self._governed.metrics()
