"""What a pool knows of a model: its facts before it is loaded, and one version of it in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, Literal, Protocol, TypeVar

from tidegate.cloud.gpu_memory import MemorySum
from tidegate.cloud.model_settings import AdapterSettings, ModelSettings
from tidegate.errors import RequestError, TidegateError

if TYPE_CHECKING:  # it imports torch, and this module
    from tidegate.cloud.encoders import EncoderFacts

Place = Literal["host", "gpu"]
"""Whose memory a model takes."""
State = Literal["unloaded", "loading", "ready", "failed"]
RETRY_S: Final = 10.0
"""After a load that failed: long enough not to read gigabytes for every call."""
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

    encoder: EncoderFacts | None = None
    """Of an encoder."""

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


class InUse(Generic[M]):
    """What a call that named a model, or an adapter, has for as long as it runs."""

    def __init__(self, entry: Entry[M], version: Version[M], adapter: str | None) -> None:
        """Look the adapter up as it is now, settings and version together.

        Raises:
            RequestError: it went while the model was loaded.
        """
        self.model = version.model
        self.name = entry.settings.name if adapter is None else adapter
        self.adapter: AdapterSettings | None = None
        self.adapter_version = ""
        if adapter is not None:
            found = [one for one in entry.settings.adapters if one.name == adapter]
            if not found:
                problem = f"{adapter[:64]!r} is not served any more"
                raise RequestError("model", problem, status=404)
            self.adapter, self.adapter_version = found[0], entry.facts.adapters[adapter]


def find(
    entries: Mapping[str, Entry[M]], name: str | None
) -> tuple[Entry[M], AdapterSettings | None]:
    """Whom a call means that names `name`; the first model when it names none.

    Raises:
        RequestError: nobody has that name.
    """
    if name is None:
        return next(iter(entries.values())), None
    found = entries.get(name)
    if found is not None:
        return found, None
    for entry in entries.values():
        for adapter in entry.settings.adapters:
            if adapter.name == name:
                return entry, adapter
    raise RequestError("model", f"{name[:64]!r} is not served here", status=404)
