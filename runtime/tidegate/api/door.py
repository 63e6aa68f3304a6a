"""What every request passes, in and out: an id, the host and key checks, errors as JSON.

A plain ASGI middleware. Nothing inside it ever shows a stack trace to a client, and nothing it
logs holds request text: of an unexpected exception it logs the type and the frames, no message.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tidegate.api.admission import Knock, Visit, keep_visit
from tidegate.api.answers import HIDDEN_MESSAGE, error_answer, error_object, status_of_code
from tidegate.api.connection import MOST_HEAD_BYTES
from tidegate.api.log_context import LogContext, log_context, logged_as, trace_id_of
from tidegate.api.responded import Responded
from tidegate.api.settings import HttpSettings
from tidegate.api.tls import CLIENT_NAME
from tidegate.api.tracing import RequestSpan, keep_span
from tidegate.engine.events import Failed
from tidegate.errors import (
    CapacityError,
    DeadlineError,
    TidegateError,
    UnavailableError,
    describe_defect,
)

_log = logging.getLogger(__name__)

RETRY_AFTER_S: Final = 2.0
"""Told with a 503, which unlike `CapacityError` carries no hint of its own."""

_MOST_HEADERS: Final = 100
_ID_KEY = "tidegate.request_id"
_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class ClientGoneError(Exception):
    """The client went away; there is nobody to answer."""


class FailedAnswerError(Exception):
    """The backend ended the answer with `Failed`, or broke its promise of one terminal event."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.code)
        self.failed = failed


def request_id(scope: Scope) -> str:
    """The id that the answer's `X-Request-Id` will have."""
    return str(scope[_ID_KEY][0])


def adopt_request_id(scope: Scope, backend_id: str) -> None:
    """Use the backend's id in `X-Request-Id`, unless the client brought its own."""
    _, given = scope[_ID_KEY]
    if not given:
        scope[_ID_KEY] = (backend_id, False)
        context = log_context()
        if context is not None:
            context.request_id = backend_id


def error_response(error: Exception, scope: Scope) -> JSONResponse:
    """The answer to a request that ended in `error`; logs it if it was unexpected."""
    headers = {}
    match error:
        case FailedAnswerError(failed=failed):
            status = status_of_code(failed.code)
            # As in `error_answer`: what a library said of a failed step is for the log.
            hidden = status >= 500 and not failed.retryable
            message = HIDDEN_MESSAGE if hidden else failed.message
            body = error_object(message, status=status, code=failed.code)
        case TidegateError():
            status, body = error_answer(error)
            if status >= 500 and not error.retryable and not isinstance(error, DeadlineError):
                log_unexpected(error, scope)
        case _:
            log_unexpected(error, scope)
            status = 500
            body = error_object("internal error", status=500, code="internal_error")
    if status in (429, 503):
        wait_s = error.retry_after_s if isinstance(error, CapacityError) else RETRY_AFTER_S
        headers = {"Retry-After": str(max(1, math.ceil(wait_s)))}
    if status in (408, 413):
        headers = {"Connection": "close"}  # the rest of the body is not worth reading
    return JSONResponse(body, status, headers)


def log_unexpected(error: Exception, scope: Scope) -> None:
    """Log it without its message, see `describe_defect`."""
    _log.error("request %s failed with %s", request_id(scope), describe_defect(error))


class Door:
    """The middleware. See the module's docstring."""

    def __init__(self, app: ASGIApp, settings: HttpSettings, responded: Responded) -> None:
        """Guard `app`; `responded` is told the path and the status of each request, 0 for none."""
        self._app = app
        self._settings = settings
        self._responded = responded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; other kinds of scope pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        scope[_ID_KEY] = (
            (given, True) if _SAFE_ID.fullmatch(given) else (secrets.token_hex(8), False)
        )
        span = self._span(scope, headers)
        trace_id = trace_id_of(headers.get("traceparent", "")) if span is None else span.trace_id
        context = LogContext(request_id=request_id(scope), trace_id=trace_id)
        status = 0
        with logged_as(context):
            try:
                status = await self._serve(scope, receive, send, headers)
            finally:
                if span is not None:
                    span.end(status, request_id(scope))

    async def _serve(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> int:
        """Serve it, whatever comes of that; its status, 0 for none."""
        status, visit = 0, None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                answered = MutableHeaders(scope=message)
                answered["X-Request-Id"] = request_id(scope)
                if visit is not None:
                    answered.update(visit.headers)
            await send(message)

        try:
            refusal = _wrong_head(scope) or self._wrong_host(headers)
            if refusal is None:
                visit = self._visit(scope, headers)
                refusal = self._refusal(scope["path"], headers, visit)
            await (refusal or self._app)(scope, receive, send_with_id)
        except ClientGoneError:
            _log.info("request %s: the client left", request_id(scope))
        except asyncio.CancelledError:  # the service ends before the request has
            if not status:
                stopped = UnavailableError("the service is shutting down")
                await error_response(stopped, scope)(scope, receive, send_with_id)
            raise
        except Exception as error:
            response = error_response(error, scope)
            if not status:
                await response(scope, receive, send_with_id)
        finally:
            self._responded(scope["path"], status)
            if visit is not None:
                visit.leave(status, request_id(scope))
        return status

    def _span(self, scope: Scope, headers: Headers) -> RequestSpan | None:
        tracer, path = self._settings.tracer, scope["path"]
        if tracer is None or path in self._settings.open_paths:
            return None
        span = tracer.begin(f"{scope['method']} {self._responded.route(path)}", headers)
        keep_span(scope, span)
        return span

    def _wrong_host(self, headers: Headers) -> JSONResponse | None:
        allowed = self._settings.allowed_hosts
        if not allowed or _host_name(headers.get("host", "")) in allowed:
            return None
        body = error_object("this Host is not served here", status=403, code="wrong_host")
        return JSONResponse(body, 403)

    def _visit(self, scope: Scope, headers: Headers) -> Visit | None:
        """Knock where somebody keeps account of visits; probes are none."""
        admission = self._settings.admission
        if admission is None or scope["path"] in self._settings.open_paths:
            return None
        client = scope.get("client")
        knock = Knock(
            method=scope["method"],
            path=scope["path"],
            key=_bearer(headers),
            source="" if client is None else client[0],
            client=scope.get("state", {}).get(CLIENT_NAME),
        )
        visit = admission.knock(knock)
        keep_visit(scope, visit)
        return visit

    def _refusal(self, path: str, headers: Headers, visit: Visit | None) -> JSONResponse | None:
        """The answer to a request that may not pass; None lets it."""
        if visit is not None:
            return visit.refusal
        authorise = self._settings.authorise
        if authorise is None or path in self._settings.open_paths or authorise(_bearer(headers)):
            return None
        body = error_object("no valid API key was given", status=401, code="invalid_api_key")
        return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})


def _wrong_head(scope: Scope) -> JSONResponse | None:
    """The answer to a head that is too long: h11 looks only while it waits for more of it."""
    pairs = scope["headers"]
    head_bytes = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    head_bytes += sum(len(name) + len(value) for name, value in pairs)
    if len(pairs) <= _MOST_HEADERS and head_bytes <= MOST_HEAD_BYTES:
        return None
    allowed = f"must be at most {_MOST_HEADERS} headers and {MOST_HEAD_BYTES} bytes"
    problem = f"a head of {len(pairs)} headers and {head_bytes} bytes: {allowed}"
    return JSONResponse(error_object(problem, status=431, code="invalid_request"), 431)


def _bearer(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def _host_name(host: str) -> str:
    """`Host` without its port; IPv6 addresses keep their brackets."""
    return re.sub(r":\d*$", "", host).lower()
