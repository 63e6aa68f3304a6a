"""`Batch`: a step with the requests of its rows, and what an executor's shape implies for it."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.engine.choosing import Ask
from tidegate.engine.drafts import Wish
from tidegate.engine.executor import ExecutorLimits, ExecutorStep, PagedGeometry, SlotGeometry
from tidegate.engine.generation import Generation
from tidegate.engine.kv import KvCache
from tidegate.engine.paged_kv import PagedKv
from tidegate.engine.prefix_disk import UnitCopy
from tidegate.engine.scheduler import Budget
from tidegate.engine.settings import EngineSettings
from tidegate.engine.slot_kv import SlotKv
from tidegate.engine.speculation import Guessing


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
        pairs = zip(self.chunks, self.step.rows, strict=True)
        return tuple(
            generation.ask(ahead=int(row.fed is not None))
            for (generation, _), row in pairs
            if row.logits
        )


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


def wish_of(one: Generation, most: int, context_tokens: int) -> Wish:
    """What drafters are told about a request that may guess `most` tokens."""
    return Wish(
        key=one.key,
        tokens=one.tokens,
        most=most,
        guide=one.guide,
        shared=one.request.reuse,
        remaining=one.remaining(context_tokens),
    )
