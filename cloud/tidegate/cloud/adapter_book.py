"""`AdapterBook`: the adapters of one model in memory, a bounded number, least recently used first.

An adapter is read by the first call that names it and stays until another one needs its place; one
that a call uses stays. Each load has a number of its own, so KV of an adapter that was replaced by
another under the same name is never found again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from tidegate.cloud.model_settings import AdapterSettings
from tidegate.cloud.model_source import SourceFacts
from tidegate.cloud.pooled_model import RETRY_S
from tidegate.engine.adapting import Adapting, new_adapter_number
from tidegate.errors import CapacityError, CheckpointError, UnavailableError, describe_defect
from tidegate.model.architecture import Architecture
from tidegate.model.lora import Adapter, LowRank
from tidegate.model.registry import Source
from tidegate.model.roles import roles

_log = logging.getLogger(__name__)

_FLOAT: Final = 4


@dataclass(slots=True, kw_only=True, eq=False)
class _Loaded:
    """One adapter in memory."""

    name: str
    version: str
    number: int
    used: int
    leases: int = 0


class AdapterBook:
    """Used from the event loop.

    Args:
        executor: keeps the adapters.
        arch: the model.
        sources: see `SourceFacts.sources`.
        most: adapters in memory at once.
    """

    def __init__(
        self,
        executor: Adapting,
        arch: Architecture,
        sources: Mapping[str, Source],
        *,
        most: int,
    ) -> None:
        self._executor, self._sources, self._most = executor, sources, most
        self._shapes = {name: role.shape for name, role in roles(arch).items()}
        self._loaded: list[_Loaded] = []
        self._failed: dict[str, tuple[str, float]] = {}
        """By name: the version that could not be read, and nobody tries again before."""
        self._turn = asyncio.Lock()
        self._uses = itertools.count(1)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of those in memory."""
        return tuple(one.name for one in self._loaded)

    @asynccontextmanager
    async def use(self, settings: AdapterSettings, version: str) -> AsyncIterator[int]:
        """Have an adapter for the length of a block; gives its number.

        Args:
            settings: where it is.
            version: of its files; another one is another adapter.

        Raises:
            CapacityError: as many as may be in memory are in use.
            UnavailableError: it cannot be read any more.
        """
        found = self._find(settings, version)
        if found is None:
            async with self._turn:
                found = self._find(settings, version) or await self._load(settings, version)
                found.leases += 1
        else:
            found.leases += 1
        found.used = next(self._uses)
        try:
            yield found.number
        finally:
            found.leases -= 1

    def _find(self, settings: AdapterSettings, version: str) -> _Loaded | None:
        key = settings.name, version
        return next((one for one in self._loaded if (one.name, one.version) == key), None)

    async def _load(self, settings: AdapterSettings, version: str) -> _Loaded:
        problem = f"adapter {settings.name!r} could not be loaded; the service's log has why"
        failed, retry_at_s = self._failed.get(settings.name, ("", 0.0))
        if failed == version and time.monotonic() < retry_at_s:
            raise UnavailableError(problem)
        self._idle_ones()
        try:
            layers = await asyncio.to_thread(self._read, settings)
        except Exception as error:  # the boundary to what reads files that may be damaged
            told = str(error) if isinstance(error, CheckpointError) else describe_defect(error)
            _log.error("adapter %s: %s", settings.name, told)
            self._failed[settings.name] = version, time.monotonic() + RETRY_S
            raise UnavailableError(problem) from error
        self._failed.pop(settings.name, None)
        self._make_room()  # only now: for one that cannot be read, nobody goes
        found = _Loaded(name=settings.name, version=version, number=new_adapter_number(), used=0)
        self._executor.load_adapter(found.number, layers)
        self._loaded.append(found)
        return found

    def _make_room(self) -> None:
        while len(self._loaded) >= self._most:
            oldest = min(self._idle_ones(), key=lambda one: one.used)
            self._loaded.remove(oldest)
            self._executor.unload_adapter(oldest.number)

    def _idle_ones(self) -> list[_Loaded]:
        """Those that could go; raises when one would have to, and none can."""
        idle = [one for one in self._loaded if not one.leases]
        if not idle and len(self._loaded) >= self._most:
            raise CapacityError(f"{self._most} adapters are in use: at most {self._most} may")
        return idle

    def _read(self, settings: AdapterSettings) -> dict[str, LowRank]:
        with Adapter.open(settings.path, sha256=settings.sha256) as adapter:
            return adapter.low_ranks(adapter.checked(self._sources, self._shapes))


def adapter_bytes(settings: AdapterSettings, source: SourceFacts) -> int:
    """What an adapter takes in memory, after a look at everything but its numbers.

    Raises:
        CheckpointError: it is damaged, of a kind that must be merged, or for another model.
    """
    shapes = {name: role.shape for name, role in roles(source.arch).items()}
    with Adapter.open(settings.path, sha256=settings.sha256) as adapter:
        deltas = adapter.checked(source.sources, shapes)
        entries = adapter.file.entries
        names = [name for delta in deltas.values() for name in (delta.a, delta.b)]
        return _FLOAT * sum(math.prod(entries[name].shape) for name in names)
