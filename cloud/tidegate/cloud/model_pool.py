"""`ModelPool`: several models in one service, loaded when they are needed, within one budget.

A model that is not in memory is loaded by the first call that names it; others wait with it, a
bounded number and no longer than their deadlines. When there is no room, idle models go, the least
recently used first; a model in use stays. One load runs at a time, so that what is planned holds.
A load that fails is the answer of those who waited; the next call after a while tries again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, Generic, TypeVar

from tidegate.cloud.model_settings import ModelSettings, PoolSettings
from tidegate.cloud.pool_errors import told, told_by_name
from tidegate.cloud.pool_room import MIB, Resident, Room, mib, plan_room, sum_of
from tidegate.cloud.pooled_model import (
    RETRY_S,
    Entry,
    InUse,
    M,
    Maker,
    ModelFacts,
    Place,
    Version,
    find,
)
from tidegate.errors import (
    CapacityError,
    ConfigError,
    RequestError,
    TidegateError,
    UnavailableError,
    describe_defect,
)

T = TypeVar("T")

_log = logging.getLogger(__name__)

ROOM_SHARE: Final = 0.5
"""Of the time that a call waits for a model, for others to become idle; the rest is for reading."""


class ModelPool(Generic[M]):
    """See the module. Everything is called from one event loop.

    Args:
        settings: which models there are.
        maker: describes and loads them.
        budget: bytes that several models may take in a place when nothing else is set; None for
            no bound.
    """

    def __init__(
        self,
        settings: PoolSettings,
        maker: Maker[M],
        budget: Callable[[Place], int | None] = lambda place: None,
    ) -> None:
        self.settings = settings
        self._maker, self._budget_of = maker, budget
        self._budgets: dict[Place, int | None] = {}
        self.entries: dict[str, Entry[M]] = {}
        self.retiring: set[Version[M]] = set()
        """Versions that were replaced and still answer."""
        self.turn = asyncio.Lock()
        """Whoever has it loads or replaces."""
        self._uses = itertools.count(1)
        self._changed = asyncio.Event()
        self._tasks = set[asyncio.Task[Any]]()
        self._broken: asyncio.Future[None] | None = None
        self._stopping: asyncio.Future[None] | None = None
        self.accepting = True

    async def start(self) -> None:
        """Describe all models, and load those that are to be loaded at start.

        Raises:
            ConfigError: one, or those to be loaded at start, need more than all may take; the sum
                is written out.
            TidegateError: one cannot be read or loaded.
        """
        self._stopping = asyncio.get_running_loop().create_future()
        for settings in self.settings.models:
            facts = await self.describe(settings)
            self._measured(facts.place)  # before anything of ours is there
            self.check_fits(settings.name, facts)
            self.entries[settings.name] = Entry(settings, facts)
        # Last what takes whatever it finds: it must leave the others theirs.
        for entry in sorted(self.entries.values(), key=lambda one: one.facts.memory is None):
            if entry.settings.load == "start":
                await self._load_at_start(entry)

    async def run(self) -> None:
        """Until cancelled, or until a model's engine failed, which is a defect of ours."""
        self._broken = asyncio.get_running_loop().create_future()
        for version in self.versions():
            if version.task.done():
                self._ended(version)
        await self._broken

    async def drain(self, timeout_s: float) -> bool:
        """Take no new calls and let those here end; False when some had to be ended."""
        self._stop()
        drains = [version.model.drain(timeout_s) for version in self.versions()]
        return all(await asyncio.gather(*drains))

    async def close(self) -> None:
        """End everything. A load that runs is waited for: nothing can interrupt it."""
        self._stop()
        while self._tasks:
            await asyncio.wait(self._tasks)
        for version in self.versions():
            await version.end()
        for entry in self.entries.values():
            entry.current = None

    @asynccontextmanager
    async def use(
        self, name: str | None, *, deadline_ms: int | None = None
    ) -> AsyncIterator[InUse[M]]:
        """Have a model for the length of a block; it is loaded first when it has to be.

        Args:
            name: of a model or an adapter; None for the first model.
            deadline_ms: after which the answer is of no use.

        Raises:
            RequestError: nobody has that name.
            CapacityError: there is no room, or too many wait.
            UnavailableError: it could not be loaded, not in time, or the service stops.
        """
        entry, adapter = find(self.entries, name)
        if not self.accepting:
            raise UnavailableError("the service is shutting down")
        entry.used = next(self._uses)
        version = entry.current or await self._loaded(entry, deadline_ms)
        used = InUse(entry, version, None if adapter is None else adapter.name)
        with version.lease():
            yield used

    async def describe(self, settings: ModelSettings) -> ModelFacts:
        """What is known of a model before it is loaded; raises what `Maker.describe` may."""
        with told_by_name(settings.name, "its files were looked at"):
            return await asyncio.to_thread(self._maker.describe, settings)

    def check_fits(self, name: str, facts: ModelFacts) -> None:
        """Refuse a model that could never be loaded.

        Raises:
            ConfigError: it takes more than all may take.
        """
        budget = self.budget(facts.place)
        if budget is not None and facts.memory is not None and facts.nbytes > budget:
            told = sum_of(name, facts.memory, budget, ())
            raise ConfigError("models_mib", budget // MIB, f"at least {mib(facts.nbytes)}: {told}")

    def budget(self, place: Place) -> int | None:
        """Bytes that the models may take there: as set, else what was available at first."""
        if self.settings.models_mib is not None:
            return self.settings.models_mib * MIB
        if len(self.settings.models) == 1:
            return None
        return self._measured(place)

    def _measured(self, place: Place) -> int | None:
        if place not in self._budgets:
            self._budgets[place] = self._budget_of(place)
        return self._budgets[place]

    def residents(self, place: Place) -> list[Resident]:
        """Who takes memory there."""
        found = []
        for name, entry in self.entries.items():
            if entry.current is not None and entry.current.facts.place == place:
                idle = not entry.current.leases and not entry.waiting and entry.job is None
                nbytes = entry.current.facts.nbytes
                found.append(Resident(name=name, nbytes=nbytes, idle=idle, used=entry.used))
        for version in self.retiring:
            if version.facts.place == place:
                name = f"{version.settings.name}, replaced"
                found.append(Resident(name=name, nbytes=version.facts.nbytes, idle=False, used=0))
        return found

    def room_for(self, facts: ModelFacts) -> Room:
        """Whether it fits now, and who would go."""
        return plan_room(facts.nbytes, self.budget(facts.place), self.residents(facts.place))

    async def bring(
        self, entry: Entry[M], settings: ModelSettings, facts: ModelFacts, *, wait_s: float
    ) -> Version[M]:
        """Make room, load a version and let it run; the caller has the turn.

        Args:
            entry: who it is for; its current version is left as it is.
            settings: to load it with.
            facts: what it will take.
            wait_s: for others to become idle; others may have the turn meanwhile.

        Raises:
            CapacityError: no room came free in time.
            TidegateError: it cannot be loaded.
        """
        await self._make_room(settings.name, facts, wait_s)
        began_s = time.monotonic()
        with told_by_name(settings.name, "it was loaded"):
            model = await asyncio.to_thread(self._maker.load, settings, facts)
        entry.loads += 1
        _log.info("model %s: loaded in %.1f s", settings.name, time.monotonic() - began_s)
        version = Version(settings, facts, model, freed=self._changed.set)
        version.task.add_done_callback(lambda _: self._ended(version))
        return version

    async def unload(self, entry: Entry[M]) -> None:
        """Free a model that nobody uses."""
        version, entry.current = entry.current, None
        assert version is not None
        assert not version.leases, "whoever uses a model keeps it"
        await version.retire(0)
        entry.unloads += 1
        _log.info("model %s: unloaded", entry.settings.name)

    def retire(self, version: Version[M]) -> None:
        """Let a version that was replaced end its calls, then free it, in the background."""
        self.retiring.add(version)
        self.later(self._retire(version))

    def later(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do something that `close` waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _loaded(self, entry: Entry[M], deadline_ms: int | None) -> Version[M]:
        name, most = entry.settings.name, self.settings.most_waiting
        if entry.waiting >= most:
            raise CapacityError(f"{most} calls wait for {name!r} to be loaded: at most {most} may")
        patience_s = self.settings.load_wait_s
        if deadline_ms is not None:
            patience_s = min(patience_s, deadline_ms / 1000)
        entry.waiting += 1
        try:
            async with asyncio.timeout(patience_s):
                while (version := entry.current) is None:
                    self._check_may_load(entry)
                    if entry.job is None:
                        entry.job = self.later(self._load(entry))
                    await self._until_done(entry.job)
                    if entry.current is None and entry.job is None and entry.failure is not None:
                        raise told(name, entry.failure)
                return version
        except TimeoutError:
            problem = f"model {name!r} is being loaded: not within {patience_s:g} s"
            raise UnavailableError(problem) from None
        finally:
            entry.waiting -= 1
            if not entry.waiting:
                self._changed.set()  # nobody needs the room that its load may be waiting for

    async def _until_done(self, job: asyncio.Task[TidegateError | None]) -> None:
        """Until a load has ended or the service stops."""
        assert self._stopping is not None, "it was started"
        either: set[asyncio.Future[Any]] = {job, self._stopping}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)

    def _check_may_load(self, entry: Entry[M]) -> None:
        if not self.accepting:
            raise UnavailableError("the service is shutting down")
        name, failure = entry.settings.name, entry.failure
        if self.entries.get(name) is not entry:
            raise RequestError("model", f"{name[:64]!r} is not served any more", status=404)
        if entry.job is None and failure is not None and time.monotonic() < entry.retry_at_s:
            raise told(name, failure)

    async def _load_at_start(self, entry: Entry[M]) -> None:
        name, facts = entry.settings.name, entry.facts
        room = self.room_for(facts)
        if room.verdict != "fits" or room.unload:
            budget = self.budget(facts.place)
            assert budget is not None, "there is a bound, as it does not fit"
            assert facts.memory is not None, "it has a size, as it does not fit"
            told = sum_of(name, facts.memory, budget, self.residents(facts.place))
            raise ConfigError("load", "start", f"first-use for some models: {told}")
        async with self.turn:
            entry.current = await self.bring(entry, entry.settings, facts, wait_s=0)

    async def _load(self, entry: Entry[M]) -> TidegateError | None:
        """Load a model for those who wait; its failure is kept for them."""
        try:
            with told_by_name(entry.settings.name, "room was made for it"):
                async with self.turn:
                    await self._load_now(entry)
        except TidegateError as error:
            # Room may come free at any time; a damaged file is read again after a while only.
            entry.failed(error, 0.0 if isinstance(error, CapacityError) else RETRY_S)
            _log.error("model %s: %s", entry.settings.name, error)
            return error
        finally:
            entry.job = None
            self._changed.set()
        return None

    async def _load_now(self, entry: Entry[M]) -> None:
        """With the turn; nothing is loaded when the service stops, or nobody waits any more."""
        if not self.accepting:
            return
        facts, name = await self.describe(entry.settings), entry.settings.name
        self.check_fits(name, facts)
        entry.failure = None
        wait_s = ROOM_SHARE * self.settings.load_wait_s
        if not await self._make_room(name, facts, wait_s, lambda: entry.waiting > 0):
            return
        version = await self.bring(entry, entry.settings, facts, wait_s=0)
        if not self.accepting:  # `drain` has seen to the others by now
            await version.end()
            return
        entry.facts, entry.current = facts, version

    async def _make_room(
        self,
        name: str,
        facts: ModelFacts,
        wait_s: float,
        wanted: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Have the turn and room, others unloaded for it; False when it is not wanted any more."""
        deadline_s = time.monotonic() + wait_s
        while (room := self.room_for(facts)).verdict != "fits" or room.unload:
            if room.unload:
                # One at a time: somebody may have come for the next one meanwhile.
                await self.unload(self.entries[room.unload[0]])
                continue
            left_s = deadline_s - time.monotonic()
            if not wanted():
                return False
            if room.verdict == "never" or left_s <= 0 or not self.accepting:
                raise self.no_room(name, facts)
            await self._until_changed(left_s)
        return True

    async def _until_changed(self, most_s: float) -> None:
        """Let go of the turn until something changed: another model may fit without waiting."""
        self._changed.clear()
        self.turn.release()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(most_s):
                    await self._changed.wait()
        finally:
            await self.turn.acquire()

    def no_room(self, name: str, facts: ModelFacts) -> CapacityError:
        """Its own parts for whoever asks; the log has the other models, too."""
        budget = self.budget(facts.place)
        assert facts.memory is not None, "it has a size, as it does not fit"
        assert budget is not None, "there is a bound, as it does not fit"
        others = self.residents(facts.place)
        _log.warning("no room: %s", sum_of(name, facts.memory, budget, others))
        taken = sum(one.nbytes for one in others)
        return CapacityError(
            f"{sum_of(name, facts.memory, budget, ())}\nothers in use take {mib(taken)} MiB",
            retry_after_s=RETRY_S,
        )

    async def _retire(self, version: Version[M]) -> None:
        if not await version.retire(self.settings.drain_s):
            _log.warning("model %s: calls of the old version were cut", version.settings.name)
        self.retiring.discard(version)
        self._changed.set()
        _log.info("model %s: the old version is unloaded", version.settings.name)

    def versions(self) -> list[Version[M]]:
        """All that are in memory."""
        current = [one.current for one in self.entries.values() if one.current is not None]
        return [*current, *self.retiring]

    def _stop(self) -> None:
        """Nobody waits for a load any more."""
        self.accepting = False
        self._changed.set()
        if self._stopping is not None and not self._stopping.done():
            self._stopping.set_result(None)

    def _ended(self, version: Version[M]) -> None:
        """A model's engine ended: by us, or for a defect, which ends the service if it serves."""
        error = None if version.task.cancelled() else version.task.exception()
        if error is None:
            return
        _log.error("model %s: its engine ended: %s", version.settings.name, describe_defect(error))
        serves = any(entry.current is version for entry in self.entries.values())
        if serves and self._broken is not None and not self._broken.done():
            self._broken.set_exception(error)
