"""What a pool knows of a model: its facts before it is loaded, and one version of it in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

from tidegate.cloud.gpu_memory import MemorySum
from tidegate.cloud.model_settings import ModelSettings
from tidegate.errors import TidegateError

Place = Literal["host", "gpu"]
"""Whose memory a model takes."""
State = Literal["unloaded", "loading", "ready", "failed"]
STATES: tuple[State, ...] = ("unloaded", "loading", "ready", "failed")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What is known of a model from its files' heads alone."""

    context_tokens: int
    place: Place
    memory: MemorySum | None
    """What it will take; None where it was given no bound and takes what it finds."""
    version: str
    """Changes with the files and with the settings that it would have to be loaded anew for."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """The version of each adapter, by name."""

    @property
    def nbytes(self) -> int:
        """What it counts for."""
        return 0 if self.memory is None else self.memory.nbytes


class PooledModel(Protocol):
    """A model in memory. Used from the event loop."""

    async def run(self) -> None:
        """Serve until cancelled."""

    async def probe(self) -> None:
        """Answer something small, to show that it can.

        Raises:
            TidegateError: it cannot.
        """

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new and let what is here end; False when it had to be ended."""

    def close(self) -> None:
        """Free everything; called from a thread, once it runs no longer."""


M = TypeVar("M", bound=PooledModel)
M_co = TypeVar("M_co", bound=PooledModel, covariant=True)


class Maker(Protocol[M_co]):
    """Makes models. Both are called from a thread."""

    def describe(self, settings: ModelSettings) -> ModelFacts:
        """Read the heads of a model's files, in no time.

        Raises:
            TidegateError: they are no model, or the settings do not fit it.
        """

    def load(self, settings: ModelSettings, facts: ModelFacts) -> M_co:
        """Load a model; raises what a library raises, too."""


class Version(Generic[M]):
    """One version of a model in memory, and how many calls use it."""

    def __init__(
        self,
        settings: ModelSettings,
        facts: ModelFacts,
        model: M,
        *,
        freed: Callable[[], None],
    ) -> None:
        """Begin to serve.

        Args:
            settings: that it was loaded with.
            facts: that were known before.
            model: what was loaded.
            freed: called when nobody uses it any more.
        """
        self.settings, self.facts, self.model = settings, facts, model
        self.leases = 0
        self.loaded_s = int(time.time())
        self._freed = freed
        self._unused = asyncio.Event()
        self._unused.set()
        self.task = asyncio.get_running_loop().create_task(model.run())

    @contextmanager
    def lease(self) -> Iterator[M]:
        """Keep it in memory for the length of a block."""
        self.leases += 1
        self._unused.clear()
        try:
            yield self.model
        finally:
            self.leases -= 1
            if not self.leases:
                self._unused.set()
                self._freed()

    async def retire(self, drain_s: float) -> bool:
        """Wait for those who use it, then end it.

        Whoever has it may still submit to it, so its engine is not drained before they are done.

        Returns:
            False when some took longer than `drain_s`: they then end with a retryable failure.
        """
        began_s = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._unused.wait()
        left_s = max(0.0, drain_s - (time.monotonic() - began_s))
        in_time = await self.model.drain(left_s)
        await self.end()
        return in_time

    async def end(self) -> None:
        """Stop it and free its memory."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await asyncio.to_thread(self.model.close)


class Entry(Generic[M]):
    """A name that is served: its settings, and the version that answers, if one is loaded."""

    def __init__(self, settings: ModelSettings, facts: ModelFacts) -> None:
        self.settings, self.facts = settings, facts
        self.current: Version[M] | None = None
        self.job: asyncio.Task[TidegateError | None] | None = None
        """Loads or replaces it; what it returns went wrong."""
        self.waiting = 0
        """Calls that wait for the job."""
        self.used = 0
        """See `tidegate.cloud.pool_room.Resident`."""
        self.failure: TidegateError | None = None
        self.retry_at_s = 0.0
        """Nobody tries to load it again before, on the monotonic clock."""
        self.loads = self.failed_loads = self.unloads = 0

    @property
    def state(self) -> State:
        """For people and metrics."""
        if self.current is not None:
            return "ready"
        if self.job is not None:
            return "loading"
        return "unloaded" if self.failure is None else "failed"

    def failed(self, error: TidegateError, retry_s: float) -> None:
        """Book that it could not be loaded."""
        self.failure, self.retry_at_s = error, time.monotonic() + retry_s
        self.failed_loads += 1
