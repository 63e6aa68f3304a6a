"""A pool in words and numbers: health, `/status` and metrics, model by model."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from tidegate.api.backend import Health
from tidegate.api.engine_backend import EngineBackend
from tidegate.cloud.language_model import LanguageModel
from tidegate.cloud.pool_room import mib
from tidegate.cloud.pooled_model import STATES, Version
from tidegate.cloud.served_models import Models, Served


def health_of(pool: Models) -> Health:
    """Healthy while every engine in memory makes progress; a model that is not there does no harm.

    A model that could not be loaded is told, and not a reason to restart a service that others use.
    """
    told, healthy = [], True
    alone = len(pool.entries) == 1
    accepting = pool.accepting
    for name, entry in pool.entries.items():
        detail: str = entry.state
        engine = _engine_of(entry.current)
        if engine is not None:
            now = engine.health()
            healthy, detail = healthy and now.healthy, now.detail
            accepting = accepting and now.ready
        told.append(detail if alone else f"{name}: {detail}")
    for version in pool.retiring:
        engine = _engine_of(version)
        healthy = healthy and (engine is None or engine.health().healthy)
    return Health(healthy=healthy, ready=accepting, detail="; ".join(told))


def _engine_of(version: Version[Served] | None) -> EngineBackend | None:
    """None for what is not in memory, and for encoders, whose health is asked elsewhere."""
    model = None if version is None else version.model
    return model.backend if isinstance(model, LanguageModel) else None


async def models_status(pool: Models) -> dict[str, dict[str, Any]]:
    """Each model's state, sum and engine, by name; encoders have no engine."""
    found: dict[str, dict[str, Any]] = {}
    for name, entry in pool.entries.items():
        version, memory = entry.current, entry.facts.memory
        engine = _engine_of(version)
        model = None if version is None else version.model
        adapters = model.adapters if isinstance(model, LanguageModel) else None
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
            "adapters_loaded": [] if adapters is None else list(adapters.loaded),
            "engine": None if engine is None else dict(await engine.status()),
        }
    return found


def render_engines(pool: Models) -> bytes:
    """Prometheus text of each engine; a version that was replaced is told no more."""
    engines = [_engine_of(entry.current) for entry in pool.entries.values()]
    return b"".join(engine.metrics() for engine in engines if engine is not None)


def render_pool(pool: Models) -> bytes:
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
