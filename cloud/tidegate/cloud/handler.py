"""Answers what a gateway opened: the sealed body is a call, the payloads are its events.

A gateway that restarts runs an unfinished request again and compares it with what it had stored,
so the n-th payload must be the same bytes every time: one event per token, sampling with the call's
own seed. Only the event that ends the answer may differ, because it carries times.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from tidegate.api.backend import AnswerEvent, Health, Routed
from tidegate.api.metrics import AskedCall, CallRecord, Metrics
from tidegate.api.schema import Call, read_chat, read_completion
from tidegate.api.tracing import RequestSpan, Tracer
from tidegate.api.wire import parse_json, write_event
from tidegate.cloud.call_size import most_size
from tidegate.engine.events import Failed
from tidegate.engine.text import TextModel
from tidegate.errors import RequestError, TidegateError
from tidegate.link.effects import InboundRequest

if TYPE_CHECKING:
    from tidegate.cloud.access import AccessControl
    from tidegate.cloud.link_visit import LinkVisit


class LinkBackend(Protocol):
    """What a handler asks: an engine's backend, or one that reaches engines elsewhere."""

    def answer_as(
        self, call: Call, request_id: str, *, join_unread: bool = True
    ) -> AsyncGenerator[AnswerEvent, None]:
        """See `EngineBackend.answer_as`."""

    def health(self) -> Health:
        """See `Backend.health`."""

    async def text_of(self, model: str) -> TextModel:
        """The text side of a model; see `tidegate.api.tokens.TextOf`."""


class LinkHandler:
    """`tidegate.link.gateway.Handler` over an engine."""

    def __init__(
        self,
        backend: LinkBackend,
        metrics: Metrics,
        *,
        tracer: Tracer | None = None,
        books: AccessControl | None = None,
    ) -> None:
        """Answer with `backend`, count in `metrics` and trace, as the HTTP front door does.

        `books` keep usage and audit of requests by their devices' handles; None keeps none.
        """
        self._backend, self._metrics, self._tracer = backend, metrics, tracer
        self._books = books
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def settled(self) -> None:
        """Wait until no request is being answered."""
        await self._idle.wait()

    async def __call__(self, request: InboundRequest) -> AsyncIterator[bytes]:
        """Yield the answer's events as payloads; an error is the last event, not an exception."""
        record = self._metrics.begin()
        with (
            self._working() as leave,
            self._traced(request) as span,
            self._kept(request, span) as visit,
        ):
            async with aclosing(self._answer(request, record, span, visit)) as events:
                async for event in events:
                    if self._is_going_away(event):
                        leave()
                        await asyncio.Event().wait()
                    record.see(event)
                    if visit is not None:
                        visit.see(event)
                    yield write_event(event)
            record.end()

    async def _answer(
        self,
        request: InboundRequest,
        record: CallRecord,
        span: RequestSpan | None,
        visit: LinkVisit | None,
    ) -> AsyncGenerator[AnswerEvent, None]:
        try:
            call = seeded(read_call(request.body), request.request_id)
            record.about(AskedCall(call, span))
            if visit is not None:
                visit.check_room()
            events = self._backend.answer_as(call, request.request_id.hex(), join_unread=False)
            async with aclosing(events):
                async for event in events:
                    if visit is not None and isinstance(event, Routed):
                        visit.prompt_tokens = await self._prompt_tokens(call, event.model)
                    yield event
        except TidegateError as error:
            yield Failed(code=error.code, message=str(error), retryable=error.retryable)

    def _is_going_away(self, event: AnswerEvent) -> bool:
        """The service stops: a request it cannot finish stays open, for the gateway's next start.

        Its handler waits to be cancelled. A stored failure would be final for the device.
        """
        draining = not self._backend.health().ready
        return draining and isinstance(event, Failed) and event.retryable

    async def _prompt_tokens(self, call: Call, model: str) -> int:
        """Of a call that is being answered: its model is here, and its prompt fits or was cut."""
        try:
            text = await self._backend.text_of(model)
            size = await most_size(call, model, text, text.context_tokens)
        except TidegateError:  # the service stops: that must not cost the answer
            return 0
        return size.prompt_tokens

    @contextmanager
    def _kept(
        self, request: InboundRequest, span: RequestSpan | None
    ) -> Iterator[LinkVisit | None]:
        visit = None if self._books is None else self._books.link_visit(request)
        try:
            yield visit
        finally:
            if visit is not None:
                trace_id = None if span is None else span.trace_id
                visit.leave(trace_id, runs_again=not self._backend.health().ready)

    @contextmanager
    def _traced(self, request: InboundRequest) -> Iterator[RequestSpan | None]:
        span = None if self._tracer is None else self._tracer.begin("link", {})
        try:
            yield span
        finally:
            if span is not None:
                span.end(None, request.request_id.hex())

    @contextmanager
    def _working(self) -> Iterator[Callable[[], None]]:
        """Count as active until left, by the function it gives or by leaving the block."""
        left = False
        self._active += 1
        self._idle.clear()

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                self._active -= 1
            if self._active == 0:
                self._idle.set()

        try:
            yield leave
        finally:
            leave()


def read_call(body: bytes) -> Call:
    """The call in a request's body.

    Raises:
        RequestError: it is no call; names the field.
    """
    try:
        data = parse_json(body)
    except ValueError as error:
        raise RequestError("body", str(error)) from None
    chat = isinstance(data, dict) and "messages" in data
    call = read_chat(data) if chat else read_completion(data)
    if call.n != 1:
        raise RequestError("n", f"{call.n}: must be 1 over the link, which asks once per answer")
    return call


def seeded(call: Call, request_id: bytes) -> Call:
    """A seed for a sampled answer that came without one, the same at every attempt."""
    sampling = call.sampling
    if sampling.temperature == 0 or sampling.seed is not None:
        return call
    seed = int.from_bytes(request_id[-7:])
    return replace(call, sampling=replace(sampling, seed=seed))
