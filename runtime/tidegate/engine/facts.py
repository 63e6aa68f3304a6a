"""`ExecutorFacts`: what an executor is and which path its products take, for people to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorFacts:
    """One executor, fixed for its life."""

    runtime: str
    """Library and release, such as `openvino 2026.4.1`."""
    linear: str
    """What multiplies packed weights, and if it is not the fastest there is, why."""
    threads: int | None
    """None: the library's own choice."""
    kv_precision: str
    kv_bytes: int
    """Of all KV."""
    cache: str
    """What was kept from an earlier start, or why nothing was."""
    load_s: float
    """Seconds from nothing to ready."""


@runtime_checkable
class Described(Protocol):
    """What an `Executor` may offer besides."""

    @property
    def facts(self) -> ExecutorFacts:
        """See `ExecutorFacts`."""
