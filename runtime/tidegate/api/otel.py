"""Spans for OpenTelemetry (optional extra `otel`), named by its conventions for generative AI.

A request is one span, and the queue, the prefill and the decoding of each of its answers are its
children, made when the answer is whole from the times that the engine kept: nothing per token.
Attributes: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/. What they say of
prompts and answers is left out, and so are messages of errors, which may quote them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from tidegate.api.backend import Routed
from tidegate.api.responded import CLIENT_GONE
from tidegate.api.schema import Call
from tidegate.engine.events import Finished, Timing

_FLUSH_MS: Final = 3000
"""How long the last spans may take to leave when the service ends."""
_NS: Final = 1_000_000_000


def open_provider(endpoint: str, *, service: str, share: float = 1.0) -> TracerProvider:
    """Spans go to `endpoint`, as OTLP over HTTP, from a thread of their own.

    Args:
        endpoint: the collector's URL, with its path (`/v1/traces`).
        service: its name in traces.
        share: of the traces that begin here, 0 to 1; who brings a trace decides for it.
    """
    provider = TracerProvider(
        resource=Resource.create({"service.name": service, "service.version": version("tidegate")}),
        sampler=ParentBased(TraceIdRatioBased(share)),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=5)))
    return provider


def close_provider(provider: TracerProvider) -> None:
    """Send what waits, for a few seconds at most. Blocks."""
    provider.force_flush(_FLUSH_MS)
    provider.shutdown()


class OtelTracer:
    """`tidegate.api.tracing.Tracer`."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("tidegate", version("tidegate"))
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, heads: Mapping[str, str]) -> OtelSpan:
        """See `Tracer.begin`."""
        parent = self._propagator.extract(dict(heads))
        span = self._tracer.start_span(name, context=parent, kind=SpanKind.SERVER)
        method, _, route = name.partition(" ")
        if route:
            span.set_attributes({"http.request.method": method, "http.route": route})
        return OtelSpan(self, span)

    def child(self, parent: Span, name: str, began_ns: int, ended_ns: int) -> None:
        """A span that is over already."""
        context = set_span_in_context(parent)
        self._tracer.start_span(name, context=context, start_time=began_ns).end(ended_ns)


class OtelSpan:
    """`tidegate.api.tracing.RequestSpan`."""

    def __init__(self, tracer: OtelTracer, span: Span) -> None:
        self._tracer, self._span = tracer, span
        self._reasons: list[str] = []
        self._prompt_tokens = self._cached_tokens = self._answer_tokens = 0
        self._failed: str | None = None

    @property
    def trace_id(self) -> str:
        """See `RequestSpan`."""
        return format_trace_id(self._span.get_span_context().trace_id)

    def asked(self, call: Call) -> None:
        """See `RequestSpan`."""
        if not self._span.is_recording():
            return
        operation = "chat" if call.kind == "chat" else "text_completion"
        if call.model is not None:
            self._span.update_name(f"{operation} {call.model}")
        self._span.set_attributes(_asked(call, operation))

    def answered(self, routed: Routed) -> None:
        """See `RequestSpan`."""
        self._span.set_attributes(
            {
                "gen_ai.response.model": routed.model,
                "gen_ai.response.id": routed.request_id,
                "tidegate.route": routed.route,
            }
        )

    def finished(self, finished: Finished) -> None:
        """See `RequestSpan`."""
        usage = finished.usage
        self._reasons.append(finished.reason)
        self._prompt_tokens = max(self._prompt_tokens, usage.prompt_tokens)
        self._cached_tokens = max(self._cached_tokens, usage.cached_tokens)
        self._answer_tokens += usage.completion_tokens
        if self._span.is_recording():
            self._phases(finished.timing)

    def failed(self, code: str) -> None:
        """See `RequestSpan`."""
        self._failed = self._failed or code  # the first says what it was

    def end(self, status: int | None, request_id: str) -> None:
        """See `RequestSpan`."""
        told: dict[str, AttributeValue] = {"tidegate.request_id": request_id}
        if status is not None:
            told["http.response.status_code"] = status or CLIENT_GONE
        if self._reasons:
            told |= {
                "gen_ai.response.finish_reasons": tuple(self._reasons),
                "gen_ai.usage.input_tokens": self._prompt_tokens,
                "gen_ai.usage.output_tokens": self._answer_tokens,
                "gen_ai.usage.cache_read.input_tokens": self._cached_tokens,
            }
        failed = self._failed or (str(status) if status is not None and status >= 500 else None)
        if failed is not None:
            told["error.type"] = failed
            self._span.set_status(StatusCode.ERROR)
        self._span.set_attributes(told)
        self._span.end()

    def _phases(self, took: Timing) -> None:
        """Children, from now backwards: the engine's clock is not the wall's."""
        ended_ns = time.time_ns()
        began_ns = ended_ns - round(took.total_s * _NS)

        def at_ns(seconds: float) -> int:
            return min(ended_ns, began_ns + round(seconds * _NS))

        last_s = took.first_token_s + took.decode_s
        for name, from_s, to_s in (
            ("queue", 0.0, took.first_scheduled_s),
            ("prefill", took.first_scheduled_s, took.first_token_s),
            ("decode", took.first_token_s, last_s),
        ):
            self._tracer.child(self._span, name, at_ns(from_s), at_ns(to_s))


def _asked(call: Call, operation: str) -> dict[str, AttributeValue]:
    sampling = call.sampling
    told: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "tidegate",
        "gen_ai.request.model": call.model,
        "gen_ai.request.max_tokens": sampling.max_tokens if call.max_tokens_given else None,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.choice.count": call.n if call.n != 1 else None,
        "gen_ai.output.type": "json" if _is_json(call) else "text",
    }
    return {name: value for name, value in told.items() if value is not None}


def _is_json(call: Call) -> bool:
    return call.constraint is not None and call.constraint.kind in ("json_schema", "json_object")
