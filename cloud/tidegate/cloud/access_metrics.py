"""Prometheus metrics of keys and limits: without names, unless the operator wants them.

A name is a label value, so each key adds a series of its own; and whoever may scrape reads them.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, generate_latest

from tidegate.cloud.usage import LINK, NANO, UsageRow

ALL: Final = "all"
"""The label of every key where names are not told."""


class AccessMetrics:
    """Counts since the process started."""

    def __init__(self, *, per_key: bool) -> None:
        self.per_key = per_key
        self.registry = registry = CollectorRegistry()
        self._refused = Counter(
            "tidegate_access_refused",
            "Requests that a key's rules refused, by what they lacked.",
            ["reason"],
            registry=registry,
        )
        self._calls = Counter(
            "tidegate_key_calls", "Calls that were admitted.", ["key", "outcome"], registry=registry
        )
        self._tokens = Counter(
            "tidegate_key_tokens", "Tokens of calls.", ["key", "kind"], registry=registry
        )
        self._cost = Counter(
            "tidegate_key_cost", "Cost, in the prices' currency.", ["key"], registry=registry
        )

    def refused(self, reason: str) -> None:
        """One of a few fixed words."""
        self._refused.labels(reason).inc()

    def used(self, row: UsageRow) -> None:
        """One call that is over."""
        name = LINK if row.endpoint == LINK else row.key_name  # no label names a device
        key = name if self.per_key else ALL
        self._calls.labels(key, row.outcome).inc()
        fresh_tokens = row.prompt_tokens - row.cached_tokens
        self._tokens.labels(key, "prompt").inc(fresh_tokens)
        self._tokens.labels(key, "cached").inc(row.cached_tokens)
        self._tokens.labels(key, "completion").inc(row.completion_tokens)
        self._cost.labels(key).inc(row.cost_nano / NANO)

    def render(self) -> bytes:
        """Prometheus text exposition."""
        return generate_latest(self.registry)
