"""Prometheus text of an engine, made from its snapshot when somebody asks: nothing per token.

Names are vLLM's under our prefix (`tidegate.api.exposition`). What has no counterpart there says
whether the engine makes progress, takes requests and has its model in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tidegate.engine.prefix_disk import StoreNumbers
from tidegate.engine.snapshot import STEP_TOKENS, EngineSnapshot

_MODEL = ("model_name",)


def render_engine(model: str, now: EngineSnapshot) -> bytes:
    """Prometheus text exposition of an engine: what a `Backend.metrics()` returns."""
    families = [*_gauges(model, now), *_counters(model, now)]
    families += [_step_tokens(model, now), _accepted_per_position(model, now)]
    if now.disk is not None:
        families += _prefix_disk(model, now.disk_hit_tokens, now.disk)
    return render(families)


def render(families: Iterable[Metric]) -> bytes:
    """Prometheus text of families that were made for it."""
    return generate_latest(_Told(families))


class _Told(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _gauges(model: str, now: EngineSnapshot) -> list[Metric]:
    found: list[Metric] = [
        _gauge(f"tidegate_{name}", text, model, float(value))
        for name, text, value in (
            ("num_requests_running", "Requests in the running batch.", now.running),
            ("num_requests_waiting", "Requests waiting to be scheduled.", now.waiting),
            ("kv_cache_usage_perc", "KV cache in use, 1 is all.", now.kv_usage),
            ("engine_healthy", "1 while work makes progress.", now.healthy),
            ("engine_accepting", "1 while requests are taken, 0 once it drains.", now.accepting),
            ("engine_loaded", "1 while the model is in memory.", now.loaded),
        )
    ]
    config = GaugeMetricFamily(
        "tidegate_cache_config_info",
        "Sizes of the KV cache, always 1.",
        labels=("model_name", "block_size", "num_gpu_blocks"),
    )
    config.add_metric((model, str(now.kv_unit_tokens), str(now.kv_units)), 1)
    return [*found, config]


def _counters(model: str, now: EngineSnapshot) -> list[Metric]:
    return [
        _counter(f"tidegate_{name}", text, model, value)
        for name, text, value in (
            (
                "prefix_cache_queries",
                "Tokens looked up in the prefix cache.",
                now.prefix_query_tokens,
            ),
            ("prefix_cache_hits", "Tokens found in the prefix cache.", now.prefix_hit_tokens),
            ("num_preemptions", "Requests preempted for lack of KV.", now.preemptions),
            ("spec_decode_num_drafts", "Drafts that were verified.", now.drafts),
            ("spec_decode_num_draft_tokens", "Tokens guessed ahead.", now.draft_tokens),
            (
                "spec_decode_num_accepted_tokens",
                "Guessed tokens that held.",
                now.accepted_draft_tokens,
            ),
            ("engine_steps", "Steps that succeeded.", now.steps),
            ("engine_failed_steps", "Steps that failed and were tried again.", now.failed_steps),
        )
    ]


def _step_tokens(model: str, now: EngineSnapshot) -> Metric:
    """A histogram by the number of tokens that a step computed or gave."""
    family = HistogramMetricFamily(
        "tidegate_iteration_tokens_total", "Tokens of a step.", labels=_MODEL
    )
    bounds = [*(f"{bound}.0" for bound in STEP_TOKENS), "+Inf"]
    so_far = _sums(now.step_tokens or (0,) * len(bounds))
    family.add_metric((model,), list(zip(bounds, so_far, strict=True)), now.tokens_of_steps)
    return family


def _sums(counts: Sequence[int]) -> list[float]:
    sums, total = [], 0.0
    for count in counts:
        total += count
        sums.append(total)
    return sums


def _accepted_per_position(model: str, now: EngineSnapshot) -> Metric:
    family = CounterMetricFamily(
        "tidegate_spec_decode_num_accepted_tokens_per_pos",
        "Guessed tokens that held, by their place in the draft.",
        labels=("model_name", "position"),
    )
    for position in range(len(now.accepted_lengths) - 1):
        held = sum(now.accepted_lengths[position + 1 :])
        family.add_metric((model, str(position)), held)
    return family


def _prefix_disk(model: str, hit_tokens: int, store: StoreNumbers) -> list[Metric]:
    name = "tidegate_prefix_disk"
    return [
        _gauge(f"{name}_bytes", "Bytes of the files.", model, store.kept_bytes),
        _gauge(f"{name}_units", "Units of KV kept.", model, store.units),
        _gauge(
            f"{name}_writing",
            "1 while prefixes are written, 0 once the disk refused.",
            model,
            float(store.writing),
        ),
        _counter(f"{name}_hit_tokens", "Tokens loaded instead of computed.", model, hit_tokens),
        _counter(f"{name}_writes", "Units written.", model, store.writes),
        _counter(f"{name}_evictions", "Units removed for lack of room.", model, store.evictions),
        _counter(f"{name}_errors", "Units that could not be read or written.", model, store.errors),
    ]


def _gauge(name: str, text: str, model: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=_MODEL)
    family.add_metric((model,), value)
    return family


def _counter(name: str, text: str, model: str, value: float) -> Metric:
    family = CounterMetricFamily(name, text, labels=_MODEL)
    family.add_metric((model,), value)
    return family
