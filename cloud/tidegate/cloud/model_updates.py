"""Rolling updates of a pool: a model's new version takes over without a dropped call.

Beside: the new version is loaded while the old one serves; once it has answered a probe, calls go
to it, and the old one is unloaded when its last call has ended. Drain first, where there is no room
for both: the old one ends its calls and goes, calls wait meanwhile, the new one is loaded. When the
new version cannot be loaded, the old one stays, or comes back.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Final, Generic, Literal

from tidegate.cloud.model_pool import ROOM_SHARE, ModelPool
from tidegate.cloud.model_settings import ModelSettings, PoolSettings
from tidegate.cloud.pool_errors import told_by_name
from tidegate.cloud.pooled_model import Entry, M, ModelFacts, Version
from tidegate.errors import CapacityError, TidegateError, UnavailableError

_log = logging.getLogger(__name__)

Mode = Literal["beside", "drain-first"]
MODES: Final[tuple[Mode, ...]] = ("beside", "drain-first")
PROBE_S: Final = 60.0
"""For a first token after one token: the first step of an executor may compile what it runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What became of one model."""

    name: str
    kind: Literal["added", "removed", "replaced", "settings", "same"]
    problem: str | None = None
    """Why it was not done; the old version serves on."""


class PoolUpdater(Generic[M]):
    """Applies new settings to a pool, one update at a time."""

    def __init__(self, pool: ModelPool[M]) -> None:
        """Change `pool`, which is started."""
        self._pool = pool
        self._busy = False

    async def apply(self, settings: PoolSettings, mode: Mode) -> tuple[Change, ...]:
        """Bring the pool to `settings`; models that did not change are not touched.

        Args:
            settings: all models, those that stay included. Files that changed count as a change.
            mode: how models in memory are replaced.

        Raises:
            CapacityError: another update is running.
            TidegateError: a model cannot be read or can never fit: nothing was changed.
        """
        if self._busy:
            raise CapacityError("another update of the models is running: try again later")
        self._busy = True
        try:
            return await self._apply(settings, mode)
        finally:
            self._busy = False

    async def _apply(self, settings: PoolSettings, mode: Mode) -> tuple[Change, ...]:
        pool, before = self._pool, self._pool.settings
        pool.settings = settings
        try:
            found = {model.name: await pool.describe(model) for model in settings.models}
            for name, facts in found.items():
                pool.check_fits(name, facts)
        except BaseException:
            pool.settings = before
            raise
        gone = [name for name in pool.entries if name not in found]
        changes = [await self._remove(name) for name in gone]
        changes += [await self._bring(one, found[one.name], mode) for one in settings.models]
        pool.entries = {model.name: pool.entries[model.name] for model in settings.models}
        for change in changes:
            if change.kind != "same":
                outcome = "done" if change.problem is None else f"not done: {change.problem}"
                _log.info("update: model %s %s: %s", change.name, change.kind, outcome)
        return tuple(changes)

    async def _remove(self, name: str) -> Change:
        entry = self._pool.entries.pop(name)
        while entry.job is not None:
            await asyncio.wait({entry.job})
        version, entry.current = entry.current, None
        if version is not None:
            self._pool.retire(version)
        return Change(name=name, kind="removed")

    async def _bring(self, settings: ModelSettings, facts: ModelFacts, mode: Mode) -> Change:
        name = settings.name
        entry = self._pool.entries.get(name)
        if entry is None:
            entry = self._pool.entries[name] = Entry(settings, facts)
            problem = None
            if settings.load == "start":
                problem = await self._run(entry, settings, facts, "beside")
            return Change(name=name, kind="added", problem=problem)
        while entry.job is not None:
            await asyncio.wait({entry.job})
        current = entry.facts if entry.current is None else entry.current.facts
        if current.version == facts.version:
            kind: Literal["settings", "same"] = "same"
            if (entry.settings, entry.facts) != (settings, facts):
                kind = "settings"
                entry.settings = settings
                entry.facts = facts
                if entry.current is not None:
                    # Those in memory may be the adapters of before: the larger sum holds.
                    larger = max(entry.current.facts, facts, key=lambda one: one.nbytes)
                    entry.current.settings, entry.current.facts = settings, larger
            return Change(name=name, kind=kind)
        problem = await self._run(entry, settings, facts, mode)
        return Change(name=name, kind="replaced", problem=problem)

    async def _run(
        self, entry: Entry[M], settings: ModelSettings, facts: ModelFacts, mode: Mode
    ) -> str | None:
        """Replace a version as the entry's job, so that calls can wait for it; why not, if so."""
        job = self._pool.later(self._replace(entry, settings, facts, mode))
        entry.job = job
        await asyncio.wait({job})
        problem = job.result()
        return None if problem is None else str(problem)

    async def _replace(
        self, entry: Entry[M], settings: ModelSettings, facts: ModelFacts, mode: Mode
    ) -> TidegateError | None:
        try:
            with told_by_name(settings.name, "it was replaced"):
                async with self._pool.turn:
                    await self._replace_now(entry, settings, facts, mode)
        except TidegateError as error:
            return error
        finally:
            entry.job = None
        return None

    async def _replace_now(
        self, entry: Entry[M], settings: ModelSettings, facts: ModelFacts, mode: Mode
    ) -> None:
        if entry.current is None and entry.loads:
            # Nobody has it in memory: the next call loads the new version.
            entry.settings, entry.facts, entry.failure = settings, facts, None
        elif mode == "beside" or entry.current is None:
            await self._beside(entry, settings, facts)
        else:
            await self._drain_first(entry, entry.current, settings, facts)

    async def _beside(self, entry: Entry[M], settings: ModelSettings, facts: ModelFacts) -> None:
        pool, old = self._pool, entry.current
        budget = pool.budget(facts.place)
        taken = facts.nbytes + (0 if old is None else old.facts.nbytes)
        both_fit = budget is None or taken <= budget
        wait_s = ROOM_SHARE * pool.settings.load_wait_s if both_fit else 0.0
        try:
            version = await self._probed(entry, settings, facts, wait_s)
        except CapacityError as error:
            hint = "no room for both versions: with drain-first the old one ends before"
            raise CapacityError(f"{error}\n{hint}") from error
        entry.settings, entry.facts, entry.current = settings, facts, version
        entry.failure = None
        if old is not None:
            pool.retire(old)

    async def _drain_first(
        self, entry: Entry[M], old: Version[M], settings: ModelSettings, facts: ModelFacts
    ) -> None:
        pool = self._pool
        wait_s = ROOM_SHARE * pool.settings.load_wait_s
        entry.current = None
        pool.retiring.add(old)
        await old.retire(pool.settings.drain_s)
        pool.retiring.discard(old)
        try:
            entry.current = await self._probed(entry, settings, facts, wait_s)
        except TidegateError as error:
            _log.error("model %s: %s; the old version comes back", settings.name, error)
            try:
                # Its files may have been overwritten: what is there now is what counts.
                again = await pool.describe(entry.settings)
                pool.check_fits(entry.settings.name, again)
                entry.current = await self._probed(entry, entry.settings, again, wait_s)
                entry.facts = again
            except TidegateError as lost:
                entry.failed(lost, 0.0)
            raise
        entry.settings, entry.facts, entry.failure = settings, facts, None

    async def _probed(
        self, entry: Entry[M], settings: ModelSettings, facts: ModelFacts, wait_s: float
    ) -> Version[M]:
        """A version that has shown that it answers."""
        version = await self._pool.bring(entry, settings, facts, wait_s=wait_s)
        try:
            async with asyncio.timeout(PROBE_S):
                await _probe(version)
            if not self._pool.accepting:
                raise UnavailableError("the service is shutting down")
        except BaseException as error:
            await version.end()
            if isinstance(error, TimeoutError):
                problem = f"the new version gave no token within {PROBE_S:g} s"
                raise UnavailableError(problem) from None
            raise
        return version


async def _probe(version: Version[M]) -> None:
    """Ask it something; an engine that ends meanwhile would never answer."""
    probe = asyncio.ensure_future(version.model.probe())
    try:
        await asyncio.wait({probe, version.task}, return_when=asyncio.FIRST_COMPLETED)
        if version.task.done():
            raise UnavailableError("the engine of the new version ended while it was probed")
        with told_by_name(version.settings.name, "it was probed"):
            await probe
    finally:
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
