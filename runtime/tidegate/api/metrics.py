"""Prometheus metrics of answered calls and of the engine, named as vLLM names its own.

Dashboards and autoscalers (KEDA, KServe) made for vLLM work after replacing the prefix `vllm:`
with `tidegate_`. Names and buckets from vLLM's v1/metrics/loggers.py. Each `Metrics` has its own
registry, so two apps in one process do not collide.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tidegate.api.backend import AnswerEvent, Routed
from tidegate.engine.events import Cancelled, Failed, Finished, TextDelta, Usage
from tidegate.engine.prefix_disk import StoreNumbers
from tidegate.errors import TidegateError

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_TTFT_BUCKETS = (*_TTFT_S, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_ITL_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1.0, 2.5, 5)
_E2E_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
_E2E_BUCKETS = (*_E2E_S, 120.0, 240.0, 480.0, 960.0)


class Metrics:
    """Counts the calls of every front door that shares it: HTTP here, the link in the cloud."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        model, route = ["model_name"], ["model_name", "route"]
        self.requests = Counter(
            "tidegate_requests", "Calls by where they ran.", route, registry=registry
        )
        self.success = Counter(
            "tidegate_request_success",
            "Calls by how they ended; 'abort' when the client left, 'error' when they failed.",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        self.rejections = Counter(
            "tidegate_admission_rejections",
            "Calls refused for lack of room, by error code.",
            ["code"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "tidegate_prompt_tokens", "Prompt tokens processed.", model, registry=registry
        )
        self.generation_tokens = Counter(
            "tidegate_generation_tokens", "Tokens generated.", model, registry=registry
        )
        self.ttft = Histogram(
            "tidegate_time_to_first_token_seconds",
            "From the call's arrival to its first text.",
            model,
            registry=registry,
            buckets=_TTFT_BUCKETS,
        )
        self.itl = Histogram(
            "tidegate_inter_token_latency_seconds",
            "Between texts of one answer, per token.",
            model,
            registry=registry,
            buckets=_ITL_BUCKETS,
        )
        self.e2e = Histogram(
            "tidegate_e2e_request_latency_seconds",
            "From the call's arrival to its end.",
            model,
            registry=registry,
            buckets=_E2E_BUCKETS,
        )

    def begin(self) -> CallRecord:
        """Start recording one call."""
        return CallRecord(self)

    def render(self) -> bytes:
        """Prometheus text exposition."""
        return generate_latest(self._registry)


class CallRecord:
    """One call as it is answered: `see` every event, then `end` once, whatever happened."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began_s = self._last_s = time.monotonic()
        self._model: str | None = None
        self._route: str | None = None
        self._first = True
        self._reason = "abort"

    def see(self, event: AnswerEvent) -> None:
        """Record one event of the answer."""
        match event:
            case Routed():
                self._model, self._route = event.model, event.route
                self._metrics.requests.labels(event.model, event.route).inc()
            case TextDelta():
                self._text(len(event.tokens) or 1)
            case Finished():
                self._reason = event.reason
                self._usage(event.usage)
            case Cancelled():
                self._usage(event.usage)
            case Failed():
                self._reason = "error"
                if self._model is None and event.retryable:
                    self._metrics.rejections.labels(event.code).inc()

    def failed(self, error: Exception) -> None:
        """The call raised instead of answering."""
        self._reason = "error"
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
        else:
            self._metrics.itl.labels(self._model).observe((now_s - self._last_s) / tokens)
        self._last_s = now_s

    def _usage(self, usage: Usage) -> None:
        if self._route == "cache":
            return  # nothing was processed or generated for it
        self._metrics.prompt_tokens.labels(self._model).inc(usage.prompt_tokens)
        self._metrics.generation_tokens.labels(self._model).inc(usage.completion_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineNumbers:
    """What an engine knows about itself; counters since it started."""

    model: str
    running: int
    waiting: int
    kv_usage: float
    """Part of the KV cache in use, 0 to 1 (vLLM calls it `perc` all the same)."""
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    """Prompt tokens found there."""
    preemptions: int = 0
    drafts: int = 0
    """Rows of steps that verified guessed tokens."""
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


def render_engine(numbers: EngineNumbers) -> bytes:
    """Prometheus text exposition of an engine: what a `Backend.metrics()` returns."""
    registry = CollectorRegistry()
    gauges = {
        "num_requests_running": ("Requests in the running batch.", numbers.running),
        "num_requests_waiting": ("Requests waiting to be scheduled.", numbers.waiting),
        "kv_cache_usage_perc": ("KV cache in use, 1 is all.", numbers.kv_usage),
    }
    counters = {
        "prefix_cache_queries": ("Tokens looked up in the prefix cache.", numbers.prefix_queries),
        "prefix_cache_hits": ("Tokens found in the prefix cache.", numbers.prefix_hits),
        "num_preemptions": ("Requests preempted for lack of KV.", numbers.preemptions),
        "spec_decode_num_drafts": ("Drafts that were verified.", numbers.drafts),
        "spec_decode_num_draft_tokens": ("Tokens guessed ahead.", numbers.draft_tokens),
        "spec_decode_num_accepted_tokens": (
            "Guessed tokens that held.",
            numbers.accepted_draft_tokens,
        ),
    }
    for name, (text, value) in gauges.items():
        gauge = Gauge(f"tidegate_{name}", text, ["model_name"], registry=registry)
        gauge.labels(numbers.model).set(value)
    for name, (text, value) in counters.items():
        counter = Counter(f"tidegate_{name}", text, ["model_name"], registry=registry)
        counter.labels(numbers.model).inc(value)
    return generate_latest(registry)


def render_prefix_disk(model: str, hit_tokens: int, store: StoreNumbers) -> bytes:
    """Prometheus text exposition of the prefix cache's disk tier."""
    registry = CollectorRegistry()
    gauges = {
        "bytes": ("Bytes of the files.", store.kept_bytes),
        "units": ("Units of KV kept.", store.units),
        "writing": ("1 while prefixes are written, 0 once the disk refused.", store.writing),
    }
    counters = {
        "hit_tokens": ("Tokens loaded instead of computed.", hit_tokens),
        "writes": ("Units written.", store.writes),
        "evictions": ("Units removed for lack of room.", store.evictions),
        "errors": ("Units that could not be read or written.", store.errors),
    }
    for name, (text, value) in gauges.items():
        gauge = Gauge(f"tidegate_prefix_disk_{name}", text, ["model_name"], registry=registry)
        gauge.labels(model).set(value)
    for name, (text, value) in counters.items():
        counter = Counter(f"tidegate_prefix_disk_{name}", text, ["model_name"], registry=registry)
        counter.labels(model).inc(value)
    return generate_latest(registry)


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
