"""Prometheus metrics of answered calls, named as vLLM names its own under our prefix.

Each `Metrics` has its own registry, so two apps in one process do not collide. A call's tokens cost
one observation each; everything else is counted when it ends. Those of engines are in
`engine_metrics`, vLLM's own names in `exposition`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from tidegate.api.backend import AnswerEvent, Routed
from tidegate.api.exposition import exposition
from tidegate.api.metrics_buckets import CHOICES, COUNTS, REQUEST_S, TOKEN_S, TTFT_S, Buckets
from tidegate.api.schema import Call
from tidegate.api.tracing import RequestSpan
from tidegate.engine.events import Cancelled, Failed, Finished, TextDelta, Usage
from tidegate.errors import TidegateError

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_REASONS: Final = ("stop", "length", "tool_calls", "content_filter", "abort", "error")
_MODEL: Final = ("model_name",)


class Metrics:
    """Counts the calls of every front door that shares it: HTTP here, the link in the cloud.

    Args:
        vllm_names: `show` tells vLLM's names as well.
    """

    def __init__(self, *, vllm_names: bool = False) -> None:
        self._vllm_names = vllm_names
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # nothing where the system has no /proc
        self.requests = self._counter("requests", "Calls by where they ran.", "route")
        self.success = self._counter(
            "request_success",
            "Calls by how they ended; 'abort' when the client left, 'error' when they failed.",
            "finished_reason",
        )
        self.rejections = Counter(
            "tidegate_admission_rejections",
            "Calls refused for lack of room, by error code.",
            ["code"],
            registry=self._registry,
        )
        self.responses = Counter(
            "tidegate_http_responses",
            "Answered HTTP requests; 499 when the client left before an answer.",
            ["path", "status"],
            registry=self._registry,
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answered calls.")
        self.cached_tokens = self._counter(
            "prompt_tokens_cached", "Those that were found in the prefix cache."
        )
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.ttft = self._histogram(
            "time_to_first_token_seconds", "From the call's arrival to its first text.", TTFT_S
        )
        self.itl = self._histogram(
            "inter_token_latency_seconds", "Between texts of one answer, per token.", TOKEN_S
        )
        self.e2e = self._histogram(
            "e2e_request_latency_seconds", "From the call's arrival to its end.", REQUEST_S
        )
        self.phases = _Phases(self)
        self.sizes = _Sizes(self)

    def begin(self) -> CallRecord:
        """Start recording one answer of a call."""
        return CallRecord(self)

    def responded(self, path: str, status: int) -> None:
        """An HTTP request is over; `path` is one of those that are served."""
        self.responses.labels(path, str(status)).inc()

    def expect(self, models: Iterable[str]) -> None:
        """Tell of these models from the beginning, so that rates know their first call."""
        for model in models:
            for reason in _REASONS:
                self.success.labels(model, reason)
            for family in (
                self.prompt_tokens,
                self.cached_tokens,
                self.generation_tokens,
                self.ttft,
                self.itl,
                self.e2e,
                *self.phases.all,
                *self.sizes.all,
            ):
                family.labels(model)

    def watch_certificate(self, expires_s: Callable[[], float]) -> None:
        """Tell when the listener's certificate ends, as `expires_s` says in Unix seconds."""
        Gauge(
            "tidegate_tls_certificate_expires_seconds",
            "When the listener's certificate ends, in Unix seconds.",
            registry=self._registry,
        ).set_function(expires_s)

    def render(self) -> bytes:
        """Prometheus text exposition of what is counted here."""
        return generate_latest(self._registry)

    def show(self, others: bytes) -> bytes:
        """What `/metrics` answers: this and the text of the other parts, each family once."""
        return exposition(self.render() + others, vllm=self._vllm_names)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tidegate_{name}", text, [*_MODEL, *labels], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Buckets) -> Histogram:
        return Histogram(f"tidegate_{name}", text, _MODEL, registry=self._registry, buckets=buckets)


class _Phases:
    """Where the time of whole answers went, as the engine told it."""

    def __init__(self, metrics: Metrics) -> None:
        def seconds(name: str, text: str) -> Histogram:
            return metrics._histogram(f"request_{name}_time_seconds", text, REQUEST_S)

        self.queue = seconds("queue", "From a call's submission to its first step.")
        self.prefill = seconds("prefill", "From its first step to its first token.")
        self.decode = seconds("decode", "From its first token to its last.")
        self.inference = seconds("inference", "From its first step to its last token.")
        self.per_token = metrics._histogram(
            "request_time_per_output_token_seconds",
            "Mean time of an answer's tokens after the first.",
            TOKEN_S,
        )
        self.all = (self.queue, self.prefill, self.decode, self.inference, self.per_token)

    def observe(self, model: str, finished: Finished) -> None:
        took, later = finished.timing, finished.usage.completion_tokens - 1
        self.queue.labels(model).observe(took.first_scheduled_s)
        self.prefill.labels(model).observe(took.first_token_s - took.first_scheduled_s)
        self.decode.labels(model).observe(took.decode_s)
        self.inference.labels(model).observe(
            took.first_token_s - took.first_scheduled_s + took.decode_s
        )
        if later > 0:
            self.per_token.labels(model).observe(took.decode_s / later)


class _Sizes:
    """How large calls and their answers were."""

    def __init__(self, metrics: Metrics) -> None:
        def tokens(name: str, text: str) -> Histogram:
            return metrics._histogram(f"request_{name}", text, COUNTS)

        self.prompt = tokens("prompt_tokens", "Tokens of a prompt.")
        self.computed = tokens("prefill_kv_computed_tokens", "Of those, the ones not cached.")
        self.generation = tokens("generation_tokens", "Tokens of an answer.")
        self.longest = tokens("max_num_generation_tokens", "Tokens of a call's longest answer.")
        self.max_tokens = tokens("params_max_tokens", "What calls gave as max_tokens.")
        self.choices = metrics._histogram("request_params_n", "What calls gave as n.", CHOICES)
        self.all = (
            self.prompt,
            self.computed,
            self.generation,
            self.longest,
            self.max_tokens,
            self.choices,
        )

    def observe(self, model: str, usage: Usage) -> None:
        self.prompt.labels(model).observe(usage.prompt_tokens)
        self.computed.labels(model).observe(usage.prompt_tokens - usage.cached_tokens)
        self.generation.labels(model).observe(usage.completion_tokens)


class AskedCall:
    """What a call wants, counted once however many answers (`n`) that means."""

    def __init__(self, call: Call, span: RequestSpan | None = None) -> None:
        """Begin with nothing; `span` hears of every answer, too."""
        self._call, self.span = call, span
        if span is not None:
            span.asked(call)
        self._taken = False
        self._ended = self._longest_tokens = 0

    def taken(self, sizes: _Sizes, model: str) -> None:
        """One of its answers begins."""
        if not self._taken:
            self._taken = True
            sizes.choices.labels(model).observe(self._call.n)
            sizes.max_tokens.labels(model).observe(self._call.sampling.max_tokens)

    def ended(self, sizes: _Sizes, model: str, tokens: int) -> None:
        """One of its answers is whole; after the last one the longest is known."""
        self._ended += 1
        self._longest_tokens = max(self._longest_tokens, tokens)
        if self._ended == self._call.n:
            sizes.longest.labels(model).observe(self._longest_tokens)


class CallRecord:
    """One answer as it comes: `see` every event, then `end` once, whatever happened."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began_s = self._last_s = time.monotonic()
        self._model: str | None = None
        self._route: str | None = None
        self._itl: Histogram | None = None
        self._asked: AskedCall | None = None
        self._first = True
        self._reason = "abort"

    def about(self, asked: AskedCall) -> None:
        """Say which call it answers."""
        self._asked = asked

    def see(self, event: AnswerEvent) -> None:
        """Record one event of the answer."""
        match event:
            case TextDelta():
                self._text(len(event.tokens) or 1)
            case Routed():
                self._model, self._route = event.model, event.route
                self._itl = self._metrics.itl.labels(event.model)
                self._metrics.requests.labels(event.model, event.route).inc()
                if self._asked is not None:
                    self._asked.taken(self._metrics.sizes, event.model)
                    if self._asked.span is not None:
                        self._asked.span.answered(event)
            case Finished():
                self._reason = event.reason
                self._finished(event)
            case Cancelled():
                self._usage(event.usage)
            case Failed():
                self._reason = "error"
                if self._asked is not None and self._asked.span is not None:
                    self._asked.span.failed(event.code)
                if self._model is None and event.retryable:
                    self._metrics.rejections.labels(event.code).inc()

    def read_only(self, tokens: int) -> None:
        """The call is answered; it read so many tokens and generated none."""
        self._reason = "stop"
        self._usage(Usage(prompt_tokens=tokens, completion_tokens=0))

    def failed(self, error: Exception) -> None:
        """The call raised instead of answering."""
        self._reason = "error"
        if self._asked is not None and self._asked.span is not None:
            code = error.code if isinstance(error, TidegateError) else TidegateError.code
            self._asked.span.failed(code)
        if self._model is None and isinstance(error, TidegateError) and error.retryable:
            self._metrics.rejections.labels(error.code).inc()

    def end(self) -> None:
        """Nothing follows. A call that was refused before it was routed counts no end."""
        if self._model is None:
            return
        self._metrics.success.labels(self._model, self._reason).inc()
        self._metrics.e2e.labels(self._model).observe(time.monotonic() - self._began_s)

    def _text(self, tokens: int) -> None:
        now_s = time.monotonic()
        if self._first:
            self._first = False
            self._metrics.ttft.labels(self._model).observe(now_s - self._began_s)
        elif self._itl is not None:
            self._itl.observe((now_s - self._last_s) / tokens)
        self._last_s = now_s

    def _finished(self, finished: Finished) -> None:
        self._usage(finished.usage)
        if self._asked is not None and self._asked.span is not None:
            self._asked.span.finished(finished)
        if self._route == "cache" or self._model is None:
            return
        self._metrics.phases.observe(self._model, finished)
        sizes, usage = self._metrics.sizes, finished.usage
        sizes.observe(self._model, usage)
        if self._asked is not None:
            self._asked.ended(sizes, self._model, usage.completion_tokens)

    def _usage(self, usage: Usage) -> None:
        if self._route == "cache":
            return  # nothing was processed or generated for it
        self._metrics.prompt_tokens.labels(self._model).inc(usage.prompt_tokens)
        self._metrics.cached_tokens.labels(self._model).inc(usage.cached_tokens)
        self._metrics.generation_tokens.labels(self._model).inc(usage.completion_tokens)


def render_paths(prefix: str, up: Iterable[str], *, known: Sequence[str]) -> bytes:
    """Prometheus text of `PREFIX_path`: 1 for each of the `known` paths that is in use, else 0."""
    registry = CollectorRegistry()
    gauge = Gauge(f"{prefix}_path", "Path that is in use.", ["path"], registry=registry)
    in_use = set(up)
    for path in known:
        gauge.labels(path).set(path in in_use)
    return generate_latest(registry)


def render_gauge(name: str, value: float, meaning: str) -> bytes:
    """Prometheus text of one plain gauge."""
    registry = CollectorRegistry()
    Gauge(name, meaning, registry=registry).set(value)
    return generate_latest(registry)


def render_counters(prefix: str, counts: Mapping[str, int]) -> bytes:
    """Prometheus text exposition of plain counters, `PREFIX_NAME_total`."""
    registry = CollectorRegistry()
    for name, count in counts.items():
        words = name.replace("_", " ")
        Counter(f"{prefix}_{name}", f"Link messages: {words}.", registry=registry).inc(count)
    return generate_latest(registry)
