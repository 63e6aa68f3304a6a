"""Prometheus metrics of the dynamic batching of encoders, for all that a service has."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tidegate.engine.text_batcher import BatchSeen

_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class EncoderMetrics:
    """Counts the runs of every encoder that is given `saw`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._lines: dict[str, Callable[[], int]] = {}
        model = ["model_name"]
        self._texts = Histogram(
            "tidegate_encoder_batch_texts",
            "Texts that one run of an encoder had.",
            model,
            registry=registry,
            buckets=_TEXTS,
        )
        self._calls = Counter(
            "tidegate_encoder_batch_calls",
            "Calls that runs had texts of.",
            model,
            registry=registry,
        )
        self._wait = Histogram(
            "tidegate_encoder_wait_seconds",
            "From a text's arrival to the run that it was in.",
            model,
            registry=registry,
            buckets=_SECONDS,
        )
        self._run = Histogram(
            "tidegate_encoder_run_seconds",
            "How long a run took.",
            model,
            registry=registry,
            buckets=_SECONDS,
        )
        self._tokens = Counter(
            "tidegate_encoder_tokens", "Tokens that were run.", model, registry=registry
        )
        self._padding = Counter(
            "tidegate_encoder_padding_tokens",
            "Filling up to the longest text of a run.",
            model,
            registry=registry,
        )
        self._waiting = Gauge(
            "tidegate_encoder_texts_waiting", "Texts in line.", model, registry=registry
        )

    def watch(self, model: str, waiting: Callable[[], int]) -> None:
        """Show how many texts wait for `model`; of two versions, for the later one."""
        self._lines[model] = waiting
        self._waiting.labels(model).set_function(waiting)

    def forget(self, model: str, waiting: Callable[[], int]) -> None:
        """What has this line is closed: nobody waits in it any more. What was counted stays."""
        if self._lines.get(model) == waiting:  # methods of one object are equal
            del self._lines[model]
            self._waiting.labels(model).set_function(lambda: 0)

    def saw(self, model: str, seen: BatchSeen) -> None:
        """Count one run."""
        self._texts.labels(model).observe(seen.texts)
        self._calls.labels(model).inc(seen.calls)
        self._run.labels(model).observe(seen.run_s)
        self._tokens.labels(model).inc(seen.tokens)
        self._padding.labels(model).inc(seen.padded_tokens - seen.tokens)
        wait = self._wait.labels(model)
        for wait_s in seen.waited_s:
            wait.observe(wait_s)

    def render(self) -> bytes:
        """Prometheus text exposition."""
        return generate_latest(self.registry)
