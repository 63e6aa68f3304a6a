"""A pool in words and numbers: health, `/status` and metrics, model by model."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from tidegate.api.backend import Health
from tidegate.cloud.language_model import LanguageModel
from tidegate.cloud.model_pool import ModelPool
from tidegate.cloud.pool_room import mib
from tidegate.cloud.pooled_model import STATES


def health_of(pool: ModelPool[LanguageModel]) -> Health:
    """Healthy while every engine in memory makes progress; a model that is not there does no harm.

    A model that could not be loaded is told, and not a reason to restart a service that others use.
    """
    told, healthy = [], True
    alone = len(pool.entries) == 1
    for name, entry in pool.entries.items():
        detail: str = entry.state
        if entry.current is not None:
            now = entry.current.model.backend.health()
            healthy, detail = healthy and now.healthy, now.detail
        told.append(detail if alone else f"{name}: {detail}")
    for version in pool.retiring:
        healthy = healthy and version.model.backend.health().healthy
    accepting = pool.accepting and all(
        entry.current is None or entry.current.model.backend.health().ready
        for entry in pool.entries.values()
    )
    return Health(healthy=healthy, ready=accepting, detail="; ".join(told))


async def models_status(pool: ModelPool[LanguageModel]) -> dict[str, dict[str, Any]]:
    """Each model's state, sum and engine, by name."""
    found: dict[str, dict[str, Any]] = {}
    for name, entry in pool.entries.items():
        version, memory = entry.current, entry.facts.memory
        found[name] = {
            "state": entry.state,
            "version": entry.facts.version,
            "context_tokens": entry.facts.context_tokens,
            "memory_mib": None
            if memory is None
            else {part.name: mib(part.nbytes) for part in memory.parts},
            "in_use": 0 if version is None else version.leases,
            "waiting_for_load": entry.waiting,
            "loads": entry.loads,
            "failed_loads": entry.failed_loads,
            "unloads": entry.unloads,
            "problem": None if entry.failure is None else str(entry.failure),
            "replaced_in_use": sum(
                one.leases for one in pool.retiring if one.settings.name == name
            ),
            "adapters": [one.name for one in entry.settings.adapters],
            "adapters_loaded": []
            if version is None or version.model.adapters is None
            else list(version.model.adapters.loaded),
            "engine": None if version is None else dict(await version.model.backend.status()),
        }
    return found


def render_engines(pool: ModelPool[LanguageModel]) -> bytes:
    """Prometheus text of each engine; a version that was replaced is told no more."""
    current = [entry.current for entry in pool.entries.values() if entry.current is not None]
    return b"".join(version.model.backend.metrics() for version in current)


def render_pool(pool: ModelPool[LanguageModel]) -> bytes:
    """Prometheus text of states, sums, loads and lines."""
    registry, model = CollectorRegistry(), ["model_name"]
    state = Gauge(
        "tidegate_model_state",
        "1 for the state that a model is in, else 0.",
        ["model_name", "state"],
        registry=registry,
    )
    taken = Gauge(
        "tidegate_model_memory_bytes",
        "Bytes that a model in memory was counted for.",
        model,
        registry=registry,
    )
    waiting = Gauge(
        "tidegate_model_waiting",
        "Calls that wait for a model to be loaded.",
        model,
        registry=registry,
    )
    loads = Counter(
        "tidegate_model_loads",
        "Loads of a model, by how they ended.",
        ["model_name", "outcome"],
        registry=registry,
    )
    unloads = Counter(
        "tidegate_model_unloads",
        "Times that a model made room for another one.",
        model,
        registry=registry,
    )
    for name, entry in pool.entries.items():
        for one in STATES:
            state.labels(name, one).set(one == entry.state)
        versions = [one for one in pool.versions() if one.settings.name == name]
        taken.labels(name).set(sum(one.facts.nbytes for one in versions))
        waiting.labels(name).set(entry.waiting)
        loads.labels(name, "ok").inc(entry.loads)
        loads.labels(name, "failed").inc(entry.failed_loads)
        unloads.labels(name).inc(entry.unloads)
    return generate_latest(registry)
