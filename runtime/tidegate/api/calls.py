"""Serving one call: read it, ask the backend, answer whole or as a stream.

The whole answer runs as one cancellable piece of work beside a watch on the connection, so that a
client that leaves ends the backend's iterator at once, streaming or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tidegate.api import sse
from tidegate.api.admission import Tally, visit_of
from tidegate.api.backend import AnswerEvent, Backend, Holding, Routed, Sizing
from tidegate.api.body import beside, read_json, unless_gone
from tidegate.api.choices import Event as ChoiceEvent
from tidegate.api.choices import side_by_side
from tidegate.api.door import ClientGoneError, FailedAnswerError, adopt_request_id, error_response
from tidegate.api.long_json import long_json
from tidegate.api.metrics import AskedCall, CallRecord, Metrics
from tidegate.api.models import chosen_model
from tidegate.api.progress import Progress
from tidegate.api.schema import Call
from tidegate.api.settings import HttpSettings
from tidegate.api.tracing import span_of
from tidegate.engine.events import Cancelled, Failed, Finished
from tidegate.errors import CapacityError, RequestError

Answer = AsyncGenerator[ChoiceEvent, None]
Choices = AsyncGenerator[tuple[int, ChoiceEvent], None]

_STREAM_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the stream
]
_NO_TERMINAL = Failed(
    code="internal_error", message="the answer broke off without an end", retryable=False
)
_CANCELLED = Failed(code="cancelled", message="the server cancelled the answer", retryable=True)


class CallEndpoint:
    """An ASGI endpoint for one kind of call."""

    def __init__(
        self,
        backend: Backend,
        read: Callable[[object], Call],
        *,
        settings: HttpSettings,
        metrics: Metrics,
        active: asyncio.BoundedSemaphore,
    ) -> None:
        self._backend = backend
        self._read = read
        self._settings = settings
        self._metrics = metrics
        self._active = active

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if self._active.locked():
            limit = self._settings.max_calls
            error = CapacityError(f"{limit} calls are being answered already: try again later")
            self._metrics.begin().failed(error)
            raise error
        async with self._active:
            call = self._read(await read_json(scope, receive, self._settings))
            call = replace(call, model=self._model(call, scope))
            call = replace(call, retry_key=_retry_key(scope) if call.n == 1 else None)
            await unless_gone(receive, self._serve(call, scope, receive, send))

    def _model(self, call: Call, scope: Scope) -> str | None:
        """The model that is asked; None for a backend's default."""
        cards = self._backend.models()
        return chosen_model(call.model, cards, scope) if cards else call.model

    async def _serve(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._admitted(call, scope) as backend:
            progress = await self._answer(backend, call, scope, send)
        if not call.stream:  # when the call is over and counted
            await (await _whole(call, progress))(scope, receive, send)

    @asynccontextmanager
    async def _admitted(self, call: Call, scope: Scope) -> AsyncIterator[Backend]:
        """What answers all of a call: one version of its model, paid for where keys pay.

        The model is held once, from before its call is sized until the answer ended: an unload in
        between would load it twice.
        """
        visit, backend = visit_of(scope), self._backend
        async with AsyncExitStack() as stack:
            try:
                if isinstance(backend, Holding):
                    least = None if visit is None else backend.least_size(call)
                    if visit is not None and least is not None:
                        await visit.expect(least)
                    backend = await stack.enter_async_context(backend.hold(call))
                if visit is not None:
                    assert isinstance(backend, Sizing), "where keys pay, calls have sizes"
                    await visit.admit(await backend.size_of(call))
            except Exception as error:
                self._metrics.begin().failed(error)
                raise
            yield backend

    async def _answer(self, backend: Backend, call: Call, scope: Scope, send: Send) -> Progress:
        visit = visit_of(scope)
        tally = Tally() if visit is None else visit.tally
        async with aclosing(self._choices(backend, call, scope, tally)) as answer:
            _, routed = await anext(answer)
            assert isinstance(routed, Routed)  # _checked lets nothing else be first
            adopt_request_id(scope, routed.request_id)
            progress = Progress(call, routed)
            if call.stream:
                await self._stream(progress, answer, scope, send)
            else:
                async for index, event in answer:
                    progress.see(index, event)
        return progress

    def _choices(self, backend: Backend, call: Call, scope: Scope, tally: Tally) -> Choices:
        asked = AskedCall(call, span_of(scope))
        return side_by_side(call, partial(self._answer_once, backend, tally=tally, asked=asked))

    def _answer_once(self, backend: Backend, call: Call, tally: Tally, asked: AskedCall) -> Answer:
        record = self._metrics.begin()
        record.about(asked)
        return _checked(backend.answer(call), record, tally)

    async def _stream(self, progress: Progress, answer: Choices, scope: Scope, send: Send) -> None:
        outlet = _Outlet(send, self._settings)
        async with _begun(answer, self._settings.heartbeat_s) as events:
            await outlet.start()
            await self._write(progress, events, outlet, scope)
        await outlet.finish()

    async def _write(
        self, progress: Progress, events: Choices, outlet: _Outlet, scope: Scope
    ) -> None:
        async with beside(outlet.keep_alive()):
            try:
                for chunk in progress.opening():
                    await outlet.write(chunk)
                async for index, event in events:
                    for chunk in progress.see(index, event):
                        await outlet.write(chunk)
                for chunk in progress.closing():
                    await outlet.write(chunk)
            except ClientGoneError:
                raise
            except Exception as error:
                # The status is sent: what is left is to say it in the stream and to close it.
                await outlet.write(b"data: " + bytes(error_response(error, scope).body) + b"\n\n")


def _retry_key(scope: Scope) -> str | None:
    """The `Idempotency-Key`, which OpenAI's clients send with every call and its retries."""
    key = Headers(scope=scope).get("idempotency-key")
    if key is not None and not (0 < len(key) <= 255 and key.isascii() and key.isprintable()):
        raise RequestError("Idempotency-Key", "must be 1 to 255 printable ASCII characters")
    return key


async def _whole(call: Call, progress: Progress) -> Response:
    if call.sampling.logprobs is None:
        return JSONResponse(progress.whole())
    # Twenty alternatives for thousands of tokens are megabytes.
    return Response(await long_json(progress.whole), media_type="application/json")


async def _checked(events: AsyncIterator[AnswerEvent], record: CallRecord, tally: Tally) -> Answer:
    """The events of an answer that goes well: `Routed`, texts, `Finished`; recorded and tallied.

    Raises:
        FailedAnswerError: the answer failed or was cancelled, or the backend broke its contract.
    """
    choice = tally.choice()
    try:
        first = True
        async for event in events:
            record.see(event)
            choice.see(event)
            if first and not isinstance(event, Routed):
                raise FailedAnswerError(_NO_TERMINAL)
            first = False
            match event:
                case Failed():
                    raise FailedAnswerError(event)
                case Cancelled():
                    raise FailedAnswerError(_CANCELLED)
                case Finished():
                    yield event
                    return
                case _:
                    yield event
        raise FailedAnswerError(_NO_TERMINAL)
    except Exception as error:
        record.failed(error)
        choice.failed()
        raise
    finally:
        record.end()
        await _close(events)


async def _close(events: AsyncIterator[AnswerEvent]) -> None:
    # `AsyncIterator` has no `aclose`, generators and our own iterators do.
    close = getattr(events, "aclose", None)
    if close is not None:
        await close()


@asynccontextmanager
async def _begun(answer: Choices, most_s: float) -> AsyncIterator[Choices]:
    """The events of an answer, entered with the first of them or after `most_s`.

    What fails before its first word has no status yet: a call that waits when the service stops is
    refused with 503, and not with an error in a stream that said 200.

    Raises:
        Exception: what the answer raised in that time.
    """
    first = asyncio.ensure_future(anext(answer))

    async def events() -> Choices:
        yield await first
        async for event in answer:
            yield event

    try:
        await asyncio.wait({first}, timeout=most_s)
        if first.done():
            first.result()
        async with aclosing(events()) as found:
            yield found
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


class _Outlet:
    """The bytes of one stream: writes are whole events, one at a time, each within the timeout."""

    def __init__(self, send: Send, settings: HttpSettings) -> None:
        self._send = send
        self._settings = settings
        self._turn = asyncio.Lock()
        self._quiet = True

    async def start(self) -> None:
        await self._send(
            {"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)}
        )

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send one piece.

        Raises:
            ClientGoneError: the reader took nothing for `write_timeout_s`.
        """
        self._quiet = False
        try:
            async with asyncio.timeout(self._settings.write_timeout_s), self._turn:
                await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except (TimeoutError, OSError):
            raise ClientGoneError from None

    async def finish(self) -> None:
        await self.write(b"", more=False)

    async def keep_alive(self) -> None:
        """Send a comment whenever nothing was sent for `heartbeat_s`."""
        while True:
            self._quiet = True
            await asyncio.sleep(self._settings.heartbeat_s)
            if self._quiet:
                await self.write(sse.HEARTBEAT)
