"""What a request tells whoever traces it; `tidegate.api.otel` is one, and most services have none.

A span is given numbers, names of models and codes of errors, never a word of prompt or answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from starlette.types import Scope

from tidegate.api.backend import Routed
from tidegate.api.schema import Call
from tidegate.engine.events import Finished

_SPAN: Final = "tidegate.span"


class RequestSpan(Protocol):
    """One request. Used by its task and by those of its answers, on one event loop."""

    @property
    def trace_id(self) -> str:
        """Of its trace, in hex."""

    def asked(self, call: Call) -> None:
        """It is this call."""

    def answered(self, routed: Routed) -> None:
        """An answer begins."""

    def finished(self, finished: Finished) -> None:
        """An answer is whole."""

    def failed(self, code: str) -> None:
        """An answer failed with this error; the first that is told counts."""

    def end(self, status: int | None, request_id: str) -> None:
        """It is over, with an HTTP status if it has one. Called once."""


class Tracer(Protocol):
    """Begins spans."""

    def begin(self, name: str, heads: Mapping[str, str]) -> RequestSpan:
        """A span of the trace that `traceparent` and `tracestate` of `heads` name, or of a new one.

        Args:
            name: the method and the route, or `link`.
            heads: of the request.
        """


def keep_span(scope: Scope, span: RequestSpan) -> None:
    """For `span_of`."""
    scope[_SPAN] = span


def span_of(scope: Scope) -> RequestSpan | None:
    """The span of this request; None where nobody traces."""
    span: RequestSpan | None = scope.get(_SPAN)
    return span
