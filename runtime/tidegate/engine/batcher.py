"""`Batcher`: keeps the line of requests and the KV books, and turns a plan into a step.

Everything between two steps of the executor, without asyncio and without text. A request that
leaves while its step runs keeps its KV until `settle`, since the executor is still writing to it.
A step may be planned while the one before it runs (`next_behind`): whoever gets a token from that
one is planned for as if it were known, and its row is fed with it on the device.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tidegate.engine.batch import Batch, budget_for, kv_for, wish_of
from tidegate.engine.executor import Executor, ExecutorStep, Row, SlotGeometry
from tidegate.engine.generation import Generation
from tidegate.engine.kv import Match
from tidegate.engine.prefix_disk import DiskPrefixes, UnitCopy
from tidegate.engine.quarantine import Quarantine
from tidegate.engine.scheduler import Budget, Candidate, Key, Plan, Room, State, plan
from tidegate.engine.settings import EngineSettings
from tidegate.engine.speculation import MOST_DRAFT_TOKENS, Guessing

_HEADROOM = 100
"""One unit in so many stays free on admission (vLLM's watermark); a device has slots, and none."""


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
        self._flying: list[Batch] = []
        """The step that runs, and the one behind it if there is one."""
        self._promised: dict[Key, int] = {}
        """While the step behind is planned: who gets a token from the one that runs, and where."""
        self._begun: dict[Key, int] = {}
        """Then too: tokens that it computes of each."""
        self._forgotten: set[Key] = set()
        """Who left a step that runs, with KV that nobody may reuse."""
        self._quarantine = Quarantine()

    @property
    def _in_flight(self) -> frozenset[Key]:
        return frozenset(one.key for batch in self._flying for one in batch.everyone)

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
        elif forget:
            self._forgotten.add(generation.key)

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

    def foreseeable(self, batch: Batch) -> bool:
        """Whether a step may be planned behind this one before it has ended."""
        simple = self._disk is None and batch.guessing is None and not self._quarantine.group
        return simple and all(one.foreseeable for one, _ in batch.chunks)

    def next_behind(self) -> Batch | None:
        """The step behind the one that runs; None when that has to end first.

        It has to when somebody would be preempted, when somebody's next token depends on more than
        the device knows, or when nobody goes on.
        """
        (flying,) = self._flying
        others = (one.foreseeable for one in self.running.values())
        if not self.foreseeable(flying) or not all(others):
            return None
        self._promised = {one.key: place for place, one in enumerate(flying.samplers)}
        self._begun = {one.key: tokens for one, tokens in flying.chunks}
        self._guesses = False
        try:
            decided = plan(self._state(self.waiting), self._budget)
            admitted = [one for one in self.waiting if one.key in decided.admitted]
            foreseen = all(one.foreseeable for one in admitted)
            if not decided.chunks or decided.preempted or not foreseen:
                return None
            for generation in admitted:
                self._admit(generation)
            return self._batch(decided)
        finally:
            self._promised, self._begun = {}, {}

    def settle(self, batch: Batch, loaded: tuple[int, ...] = ()) -> None:
        """Book what a step has computed, and of each of its loads the units that were there."""
        self._flying.remove(batch)
        for generation, tokens in batch.chunks:
            self._commit(generation, generation.computed + tokens)
        for (generation, copies), done in zip(batch.loads, loaded, strict=True):
            self._settle_load(generation, copies, done)

    def _commit(self, generation: Generation, computed: int) -> None:
        generation.computed = computed
        forget = generation.key in self._forgotten
        if generation.request.reuse and not forget:
            self.kv.commit(generation.key, generation.kv_tokens[:computed])
        if generation.key not in self.running and generation.key not in self._in_flight:
            self._forgotten.discard(generation.key)
            self.kv.release(generation.key, forget=forget)

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
        self._flying.remove(batch)
        for generation in batch.everyone:
            self.kv.release(generation.key, forget=True)
            self._forgotten.discard(generation.key)
        here = [one for one in batch.everyone if self.running.pop(one.key, None) is not None]
        for generation in here:
            self._requeue(generation)
        given_up = self._quarantine.failed(
            [generation.key for generation in here],
            alone=len(batch.everyone) == 1 and not guessed,
        )
        return tuple(one for one in self.waiting if one.key in given_up)

    def withdraw(self, batch: Batch) -> None:
        """Book that a step ran on KV that was lost in the one before: its requests start over."""
        self._flying.remove(batch)
        for generation in batch.everyone:
            self.kv.release(generation.key, forget=True)
            self._forgotten.discard(generation.key)
            if self.running.pop(generation.key, None) is not None:
                self._requeue(generation)

    def abandon_step(self) -> None:
        """Forget a step whose end nobody will see, because making it failed or the loop stops."""
        for key in self._in_flight - self.running.keys():
            self.kv.release(key, forget=True)
        self._flying.clear()
        self._forgotten.clear()
        self.kv.take_copies()

    def _state(self, line: list[Generation]) -> State:
        room = Room(free=self.kv.free, unit_tokens=self.kv.unit_tokens, headroom=self._headroom)
        # Who would free what is asked only when somebody may have to go.
        tight = room.free < len(self.running) + room.units(self._budget.tokens)
        return State(
            running=tuple(
                self._runner(one, tight) for one in self.running.values() if self._goes_on(one)
            ),
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

    def _known(self, one: Generation) -> int:
        """Its tokens, the promised one among them."""
        return one.length + (one.key in self._promised)

    def _computed(self, one: Generation) -> int:
        """Those that are computed, once the step that runs has ended."""
        return one.computed + self._begun.get(one.key, 0)

    def _goes_on(self, one: Generation) -> bool:
        """Whether the promised token is not its last, as far as lengths say."""
        return one.key not in self._promised or one.remaining(self.context_tokens) > 1

    def _runner(self, one: Generation, tight: bool) -> Candidate:
        return Candidate(
            key=one.key,
            tokens=self._known(one),
            computed=self._computed(one),
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
        match = self.kv.match(one.key, one.kv_tokens) if one.request.reuse else Match()
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
        generation.computed = self.kv.admit(generation.key, generation.kv_tokens, reuse=reuse)
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
                most = self._known(generation) - self._computed(generation)
                chunks.append((generation, min(chunk.tokens, most)))
                drafts.append(chunk.draft)
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
        if self._guesses:
            batch = replace(batch, guessing=self._guessing(batch, drafts, decided.draft_tokens))
        self._flying.append(batch)
        return batch

    def _guessing(self, batch: Batch, drafts: list[int], most: int) -> Guessing:
        wishes = tuple(
            wish_of(one, draft, self.context_tokens) if one.request.speculation else None
            for (one, _), draft in zip(batch.chunks, drafts, strict=True)
        )
        decoding = not batch.prefill_tokens and not batch.loads
        return Guessing(wishes=wishes, most=most, decoding=decoding)

    def _load(
        self, generation: Generation, tokens: int, disk: DiskPrefixes
    ) -> tuple[UnitCopy, ...]:
        end = disk.next_end(generation.key, tokens)
        self.kv.grow(generation.key, end)
        return disk.copies(generation.key, end, self.kv.place(generation.key))

    def _row(self, generation: Generation, tokens: int, draft: int) -> Row:
        past = self._computed(generation)
        end = past + tokens
        self.kv.grow(generation.key, end + draft)
        place = self.kv.place(generation.key)
        own, fed = generation.tokens[past:end], None
        if end > generation.length:
            own, fed = np.append(own, np.int64(0)), self._promised[generation.key]
        return Row(
            tokens=own,
            past=past,
            blocks=place.blocks,
            slot=place.slot,
            logits=int(end == self._known(generation)),
            fed=fed,
            adapter=generation.request.adapter,
        )
