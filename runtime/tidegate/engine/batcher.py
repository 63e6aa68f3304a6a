"""`Batcher`: keeps the line of requests and the KV books, and turns a plan into a step.

Everything between two steps of the executor, without asyncio and without text. A request that
leaves while its step runs keeps its KV until `settle`, since the executor is still writing to it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tidegate.engine.choosing import Ask
from tidegate.engine.drafts import Wish
from tidegate.engine.executor import (
    Executor,
    ExecutorLimits,
    ExecutorStep,
    PagedGeometry,
    Row,
    SlotGeometry,
)
from tidegate.engine.generation import Generation
from tidegate.engine.kv import KvCache, Match
from tidegate.engine.paged_kv import PagedKv
from tidegate.engine.prefix_disk import DiskPrefixes, UnitCopy
from tidegate.engine.quarantine import Quarantine
from tidegate.engine.scheduler import Budget, Candidate, Key, Plan, Room, State, plan
from tidegate.engine.settings import EngineSettings
from tidegate.engine.slot_kv import SlotKv
from tidegate.engine.speculation import MOST_DRAFT_TOKENS, Guessing

_HEADROOM = 100
"""One unit in so many stays free on admission (vLLM's watermark); a device has slots, and none."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """A step with the requests its rows belong to, in row order."""

    step: ExecutorStep
    chunks: tuple[tuple[Generation, int], ...]
    preempted: int
    loads: tuple[tuple[Generation, tuple[UnitCopy, ...]], ...] = ()
    """Who has no row but loads what is stored of it."""
    guessing: Guessing | None = None
    """Where a row may run guessed tokens after its own; they have room in the KV."""

    @property
    def everyone(self) -> tuple[Generation, ...]:
        """The requests of its rows and its loads."""
        return *(one for one, _ in self.chunks), *(one for one, _ in self.loads)

    @property
    def samplers(self) -> tuple[Generation, ...]:
        """The requests whose rows want logits, in row order."""
        pairs = zip(self.chunks, self.step.rows, strict=True)
        return tuple(generation for (generation, _), row in pairs if row.logits)

    @property
    def prefill_tokens(self) -> int:
        """Tokens of the rows that do more than decode; a resumed request counts again."""
        return sum(
            tokens
            for (generation, tokens), row in zip(self.chunks, self.step.rows, strict=True)
            if tokens > 1 or row.past < len(generation.request.prompt)
        )

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that those who load had not to compute so far."""
        return sum(one.cached_tokens or 0 for one, _ in self.loads)

    def asks(self) -> tuple[Ask, ...]:
        """How the tokens of `samplers` are to be chosen."""
        return tuple(generation.ask() for generation in self.samplers)


def kv_for(geometry: PagedGeometry | SlotGeometry, *, reuse: bool) -> KvCache:
    """The books that fit the executor's shape."""
    if isinstance(geometry, PagedGeometry):
        return PagedKv(geometry, reuse=reuse)
    return SlotKv(geometry, reuse=reuse)


def budget_for(limits: ExecutorLimits, settings: EngineSettings) -> Budget:
    """The executor's limits, shared out by the settings."""
    reserve = settings.prefill_reserve_tokens
    return Budget(
        tokens=limits.step_tokens,
        rows=limits.step_rows,
        chunk_tokens=settings.chunk_tokens or limits.step_tokens,
        prefill_reserve=limits.step_tokens // 4 if reserve is None else reserve,
        logits=limits.step_logits,
    )


class Batcher:
    """Requests in line and running. Every request has a place in exactly one of the two."""

    def __init__(
        self, executor: Executor, settings: EngineSettings, disk: DiskPrefixes | None = None
    ) -> None:
        self._geometry, self._reuse = executor.kv, settings.prefix_reuse
        self.kv = kv_for(self._geometry, reuse=self._reuse)
        self._budget = budget_for(executor.limits, settings)
        slots = isinstance(executor.kv, SlotGeometry)
        self._disk = disk if settings.prefix_reuse else None
        self._headroom = 0 if slots else -(-self.kv.units // _HEADROOM)
        self.context_tokens = min(
            executor.limits.context_tokens, self.kv.unit_tokens * (1 if slots else self.kv.units)
        )
        self._speculates = self._guesses = settings.speculation
        """In general, and in the step that is being made."""
        self.running: dict[Key, Generation] = {}
        self.waiting: list[Generation] = []
        self._in_flight: frozenset[Key] = frozenset()
        self._quarantine = Quarantine()

    @property
    def empty(self) -> bool:
        return not self.running and not self.waiting

    def everyone(self) -> tuple[Generation, ...]:
        return *self.running.values(), *self.waiting

    def add(self, generation: Generation) -> None:
        """Put a request in line by its rank."""
        bisect.insort(self.waiting, generation, key=lambda one: one.rank)

    def remove(self, generation: Generation, *, forget: bool = False) -> None:
        """Take a request out, wherever it is, and free its KV as soon as no step uses it."""
        if self.running.pop(generation.key, None) is None and generation in self.waiting:
            self.waiting.remove(generation)
        self._quarantine.leave((generation.key,))
        if self._disk is not None:
            if generation.request.reuse and not forget:
                self._disk.offer(generation.key, generation.tokens[: generation.computed])
            self._disk.end(generation.key)
        if generation.key not in self._in_flight:
            self.kv.release(generation.key, forget=forget)

    def forget_kv(self) -> None:
        """The executor's KV is gone: begin new books. Nobody may have any."""
        assert self.kv.free == self.kv.units, "KV is forgotten while somebody has some"
        self.kv = kv_for(self._geometry, reuse=self._reuse)

    def next(self, *, guess: bool = True) -> Batch:
        """Decide the next step and give its rows their KV; there must be work.

        Args:
            guess: whether its rows may guess at all.
        """
        group = frozenset(self._quarantine.group)
        # Suspects never do, so that a guess is never to blame.
        self._guesses = self._speculates and guess and not group
        line = [one for one in self.waiting if one.key in group] if group else self.waiting
        decided = plan(self._state(line), self._budget_now())
        admitted = [one for one in line if one.key in decided.admitted]
        for key in decided.preempted:
            self._requeue(self.running.pop(key))
        for generation in admitted:
            self._admit(generation)
        return self._batch(decided)

    def settle(self, batch: Batch, loaded: tuple[int, ...] = ()) -> None:
        """Book what a step has computed, and of each of its loads the units that were there."""
        self._in_flight = frozenset()
        for generation, tokens in batch.chunks:
            self._commit(generation, generation.computed + tokens)
        for (generation, copies), done in zip(batch.loads, loaded, strict=True):
            self._settle_load(generation, copies, done)

    def _commit(self, generation: Generation, computed: int) -> None:
        generation.computed = computed
        if generation.request.reuse:
            self.kv.commit(generation.key, generation.tokens[:computed])
        if generation.key not in self.running:
            self.kv.release(generation.key)

    def _settle_load(self, generation: Generation, copies: tuple[UnitCopy, ...], done: int) -> None:
        if self._disk is None or generation.key not in self.running:
            self.kv.release(generation.key)  # it left while it was loading
            return
        if not copies:
            return
        computed = max(generation.computed, self._disk.loaded(generation.key, len(copies), done))
        if generation.cached_tokens == generation.computed:  # it was never preempted
            generation.cached_tokens = computed
        self._commit(generation, computed)

    def keep(self, generation: Generation, accepted: int) -> None:
        """Book that so many guessed tokens of a row held: their KV is computed, as they are.

        To be called once they are among the request's tokens, but for those after its end.
        """
        if generation.key in self.running:
            known = generation.length - 1
            self._commit(generation, min(generation.computed + accepted, known))

    def clear_guesses(self, batch: Batch) -> None:
        """Give back the room of guessed tokens that did not hold."""
        if batch.guessing is not None:
            for generation, _ in batch.chunks:
                if generation.key in self.running:
                    self.kv.trim(generation.key, generation.computed)

    def clear_suspects(self, batch: Batch) -> None:
        """Suspects that came through start over later, so that the next group has all the KV."""
        suspects = self._quarantine.group
        self._quarantine.passed([generation.key for generation in batch.samplers])
        for generation in batch.samplers:
            if generation.key in suspects and generation.key in self.running:
                self._requeue(self.running.pop(generation.key))

    def settle_failed(self, batch: Batch, *, guessed: bool = False) -> tuple[Generation, ...]:
        """Book that a step's KV is lost; the requests to give up, all others start over.

        Args:
            batch: the step.
            guessed: it ran guessed tokens, so a request that was alone may not be the culprit.
        """
        self._in_flight = frozenset()
        for generation in batch.everyone:
            self.kv.release(generation.key, forget=True)
        here = [one for one in batch.everyone if self.running.pop(one.key, None) is not None]
        for generation in here:
            self._requeue(generation)
        given_up = self._quarantine.failed(
            [generation.key for generation in here],
            alone=len(batch.everyone) == 1 and not guessed,
        )
        return tuple(one for one in self.waiting if one.key in given_up)

    def abandon_step(self) -> None:
        """Forget a step whose end nobody will see, because making it failed or the loop stops."""
        for key in self._in_flight - self.running.keys():
            self.kv.release(key, forget=True)
        self._in_flight = frozenset()
        self.kv.take_copies()

    def _state(self, line: list[Generation]) -> State:
        room = Room(free=self.kv.free, unit_tokens=self.kv.unit_tokens, headroom=self._headroom)
        # Who would free what is asked only when somebody may have to go.
        tight = room.free < len(self.running) + room.units(self._budget.tokens)
        return State(
            running=tuple(self._runner(one, tight) for one in self.running.values()),
            waiting=tuple(self._front(line, room)),
            room=room,
        )

    def _front(self, line: list[Generation], room: Room) -> Iterator[Candidate]:
        """The first in line and as many more as one step could ever start.

        Nobody is overtaken, so looking up prefixes of those behind would be in vain.
        """
        tokens, free = self._budget.tokens, room.free
        for generation in line[: max(1, self._budget.most_running - len(self.running))]:
            candidate = self._waiter(generation)
            yield candidate
            tokens -= min(candidate.missing, self._budget.chunk_tokens)
            free -= room.units(candidate.tokens) - candidate.held + candidate.drawn
            if tokens < 1 or free < 1:
                return

    def _runner(self, one: Generation, tight: bool) -> Candidate:
        return Candidate(
            key=one.key,
            tokens=one.length,
            computed=one.computed,
            priority=one.request.priority,
            deadline_s=one.request.deadline_s,
            held=self.kv.held(one.key),
            exclusive=self.kv.exclusive(one.key) if tight else 0,
            stored=0 if self._disk is None else self._disk.left(one.key, one.computed),
            draft=self._most_draft(one),
        )

    def _most_draft(self, one: Generation) -> int:
        """Tokens worth guessing."""
        if not self._guesses or not one.request.speculation:
            return 0
        if one.length > one.computed + 1:
            return 0
        return max(0, min(MOST_DRAFT_TOKENS, one.remaining(self.context_tokens) - 1))

    def _waiter(self, one: Generation) -> Candidate:
        match = self.kv.match(one.key, one.tokens) if one.request.reuse else Match()
        return Candidate(
            key=one.key,
            tokens=one.length,
            computed=match.tokens,
            priority=one.request.priority,
            deadline_s=one.request.deadline_s,
            held=match.units,
            drawn=match.drawn,
            stored=self._stored(one, match.tokens),
        )

    def _stored(self, one: Generation, computed: int) -> int:
        if self._disk is None or not one.request.reuse:
            return 0
        return self._disk.stored(one.key, one.tokens, computed)

    def _budget_now(self) -> Budget:
        """With what a step may load, which is more when it holds up nobody."""
        if self._disk is None:
            return self._budget
        alone = len(self.running) + len(self.waiting) == 1
        return replace(self._budget, load_tokens=self._disk.load_tokens(alone=alone))

    def _requeue(self, generation: Generation) -> None:
        """Back in line with its tokens kept; what it had computed is computed again, or reused."""
        self.kv.release(generation.key)
        if self._disk is not None:
            self._disk.end(generation.key)
        generation.computed = 0
        self.add(generation)

    def _admit(self, generation: Generation) -> None:
        self.waiting.remove(generation)
        self.running[generation.key] = generation
        reuse = generation.request.reuse
        generation.computed = self.kv.admit(generation.key, generation.tokens, reuse=reuse)
        if self._disk is not None and reuse:
            self._disk.begin(generation.key, generation.tokens, generation.computed)
        if generation.cached_tokens is None:
            generation.cached_tokens = generation.computed

    def _batch(self, decided: Plan) -> Batch:
        loads, chunks, drafts = [], [], []
        for chunk in decided.chunks:
            generation = self.running[chunk.key]
            if self._disk is not None and self._disk.left(chunk.key, generation.computed):
                loads.append((generation, self._load(generation, chunk.tokens, self._disk)))
            elif chunk.loaded:
                # Admissions before it in this step may have changed what a slot could reuse, and
                # the store what it holds. It gets its tokens in the next step; it is a part of
                # this one all the same, since what its slot is to begin with may be copied now.
                loads.append((generation, ()))
            else:
                most = generation.length - generation.computed
                chunks.append((generation, min(chunk.tokens, most)))
                drafts.append(chunk.draft)
        self._in_flight = frozenset(one.key for one, _ in chunks) | {one.key for one, _ in loads}
        rows = tuple(
            self._row(generation, tokens, draft)
            for (generation, tokens), draft in zip(chunks, drafts, strict=True)
        )
        batch = Batch(
            step=ExecutorStep(rows=rows, copies=self.kv.take_copies()),
            chunks=tuple(chunks),
            preempted=len(decided.preempted),
            loads=tuple(loads),
        )
        if not self._guesses:
            return batch
        return replace(batch, guessing=self._guessing(batch, drafts, decided.draft_tokens))

    def _guessing(self, batch: Batch, drafts: list[int], most: int) -> Guessing:
        wishes = tuple(
            self._wish(one, draft) if one.request.speculation else None
            for (one, _), draft in zip(batch.chunks, drafts, strict=True)
        )
        decoding = not batch.prefill_tokens and not batch.loads
        return Guessing(wishes=wishes, most=most, decoding=decoding)

    def _wish(self, one: Generation, most: int) -> Wish:
        return Wish(
            key=one.key,
            tokens=one.tokens,
            most=most,
            guide=one.guide,
            shared=one.request.reuse,
            remaining=one.remaining(self.context_tokens),
        )

    def _load(
        self, generation: Generation, tokens: int, disk: DiskPrefixes
    ) -> tuple[UnitCopy, ...]:
        end = disk.next_end(generation.key, tokens)
        self.kv.grow(generation.key, end)
        return disk.copies(generation.key, end, self.kv.place(generation.key))

    def _row(self, generation: Generation, tokens: int, draft: int) -> Row:
        past, end = generation.computed, generation.computed + tokens
        self.kv.grow(generation.key, end + draft)
        place = self.kv.place(generation.key)
        return Row(
            tokens=generation.tokens[past:end],
            past=past,
            blocks=place.blocks,
            slot=place.slot,
            logits=int(end == generation.length),
        )
