"""Pools of toy models, for tests: no files, engines of `toyengine`, and loads that can go wrong."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toyexecutor import Behaviour, ToyExecutor
from toytext import toy_text

from tidegate.cloud.cloud_backend import CloudBackend
from tidegate.cloud.gpu_memory import MemoryPart, MemorySum
from tidegate.cloud.language_model import LanguageModel
from tidegate.cloud.model_settings import ModelSettings, PoolSettings
from tidegate.cloud.pool_room import MIB
from tidegate.cloud.pooled_model import ModelFacts
from tidegate.cloud.served_models import Models
from tidegate.engine.engine import Engine
from tidegate.engine.executor import PagedGeometry

TOY_MIB = 10
"""What a toy model says that it takes, unless a test says otherwise."""
_PAGED = PagedGeometry(block_tokens=4, blocks=96, bytes_per_token=8)


@dataclass
class ToyModels:
    """`Maker` of toy models; what it is told to do wrong, it does at the next load."""

    sizes_mib: dict[str, int] = field(default_factory=dict)
    gates: dict[str, threading.Event] = field(default_factory=dict)
    """A load of that name waits for its gate."""
    broken: dict[str, Exception] = field(default_factory=dict)
    """A load of that name, or version, raises."""
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    """By version: how the executor behaves."""
    versions: Counter[str] = field(default_factory=Counter)
    """By path: add to it, and the files have changed."""
    unreadable: dict[str, Exception] = field(default_factory=dict)
    """What describing a model of that name raises."""
    describes: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def describe(self, settings: ModelSettings) -> ModelFacts:
        """See `Maker.describe`."""
        self.describes.append(settings.name)
        if settings.name in self.unreadable:
            raise self.unreadable[settings.name]
        nbytes = self.sizes_mib.get(settings.name, TOY_MIB) * MIB
        path = str(settings.path)
        return ModelFacts(
            context_tokens=128,
            place="host",
            memory=MemorySum(parts=(MemoryPart(name="weights", nbytes=nbytes),)),
            version=f"{path}-{self.versions[path]}",
            adapters={one.name: f"{one.path}-0" for one in settings.adapters},
        )

    def load(self, settings: ModelSettings, facts: ModelFacts) -> LanguageModel:
        """See `Maker.load`."""
        self.loads.append(settings.name)
        gate = self.gates.get(settings.name)
        if gate is not None:
            assert gate.wait(timeout=20), "a test forgot to open the gate"
        problem = self.broken.get(settings.name) or self.broken.get(facts.version)
        if problem is not None:
            raise problem
        behaviour = self.behaviours.get(facts.version)
        executor = ClosingToy(
            _PAGED, behaviour=behaviour, closed=lambda: self.closed.append(facts.version)
        )
        engine = Engine(executor, toy_text(eos=False), model_id=settings.name)
        return LanguageModel(executor, engine)


class ClosingToy(ToyExecutor):
    """A toy executor that tells when it was closed."""

    def __init__(self, *args: Any, closed: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._closed = closed

    def close(self) -> None:
        """See `Executor.close`."""
        super().close()
        self._closed()


def toy_settings(names: Sequence[str] = ("toy",), **changed: Any) -> PoolSettings:
    """Models of these names; all but the first are loaded when they are first used."""
    models = tuple(
        ModelSettings(name=name, path=Path(name), load="first-use" if place else "start")
        for place, name in enumerate(names)
    )
    return PoolSettings(**{"models": models, "load_wait_s": 10.0, "drain_s": 5.0, **changed})


def toy_pool(
    names: Sequence[str] = ("toy",), maker: ToyModels | None = None, **settings: Any
) -> Models:
    """A pool that was not started."""
    return Models(toy_settings(names, **settings), maker or ToyModels())


@asynccontextmanager
async def started(pool: Models) -> AsyncIterator[CloudBackend]:
    """Start a pool and close it in the end."""
    try:
        await pool.start()
        yield CloudBackend(pool, created_s=int(time.time()))
    finally:
        await pool.close()
