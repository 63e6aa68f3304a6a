"""A whole engine on the toy model, and one answer collected from its events, for tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from toyexecutor import ToyExecutor
from toytext import toy_text

from tidegate.engine.drafts import Drafter, PaidDrafter
from tidegate.engine.engine import Engine
from tidegate.engine.events import Event, Finished, ScoredToken, Terminal, TextDelta
from tidegate.engine.executor import PagedGeometry, SlotGeometry
from tidegate.engine.prefix_disk import DiskPrefixes
from tidegate.engine.request import (
    Constraint,
    GenerationRequest,
    Priority,
    RequestId,
    SamplingParams,
)
from tidegate.engine.settings import EngineSettings
from tidegate.engine.steps import StepWatcher

PAGED = PagedGeometry(block_tokens=4, blocks=96, bytes_per_token=8)
SLOTS = SlotGeometry(slots=4, slot_tokens=128, bytes_per_token=8)
SHAPES = (PAGED, SLOTS)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """Everything one request gave. Building it checks that one terminal event came last."""

    text: str
    tokens: tuple[int, ...]
    scored: tuple[ScoredToken, ...]
    terminal: Terminal

    @property
    def finished(self) -> Finished:
        assert isinstance(self.terminal, Finished), self.terminal
        return self.terminal


async def collect(answer: AsyncIterator[Event]) -> Collected:
    """Read an answer to its end."""
    events = [event async for event in answer]
    *deltas, terminal = events
    assert isinstance(terminal, Terminal), "the last event is terminal"
    for delta in deltas:
        assert isinstance(delta, TextDelta), "nothing but text comes before it"
    texts = [delta for delta in deltas if isinstance(delta, TextDelta)]
    return Collected(
        text="".join(delta.text for delta in texts),
        tokens=tuple(token for delta in texts for token in delta.tokens),
        scored=tuple(one for delta in texts for one in delta.scored),
        terminal=terminal,
    )


@asynccontextmanager
async def serving(engine: Engine) -> AsyncIterator[Engine]:
    """Run the engine's loop around a block and check afterwards that no KV is held."""
    loop = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        loop.cancel()
        with suppress(asyncio.CancelledError):
            await loop
        assert engine.snapshot().kv_usage == 0


def toy_engine(
    executor: ToyExecutor | None = None,
    *,
    eos: bool = True,
    settings: EngineSettings | None = None,
    disk: DiskPrefixes | None = None,
    drafters: Sequence[Drafter] | None = None,
    draft_model: PaidDrafter | None = None,
    watcher: StepWatcher | None = None,
    ended: Callable[[RequestId], None] | None = None,
) -> Engine:
    """An engine on `executor`, or on a paged one of its own; it has the executor's clock."""
    executor = executor or ToyExecutor(PAGED)
    text = toy_text(context_tokens=executor.limits.context_tokens, eos=eos)
    return Engine(
        executor,
        text,
        model_id="toy",
        settings=settings,
        disk=disk,
        drafters=drafters,
        draft_model=draft_model,
        watcher=watcher,
        ended=ended,
        clock=executor.behaviour.clock or time.monotonic,
    )


def with_sampling(request: GenerationRequest, **changed: Any) -> GenerationRequest:
    """The request with other sampling parameters."""
    return replace(request, sampling=replace(request.sampling, **changed))


def ask(
    name: str,
    prompt: tuple[int, ...],
    *,
    max_tokens: int = 16,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = 7,
    stop: tuple[str, ...] = (),
    ignore_eos: bool = False,
    priority: Priority = Priority.NORMAL,
    deadline_s: float | None = None,
    reuse: bool = True,
    constraint: Constraint | None = None,
    speculation: bool = True,
) -> GenerationRequest:
    """A request in one line."""
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    return GenerationRequest(
        id=RequestId(name),
        prompt=prompt,
        sampling=sampling,
        priority=priority,
        deadline_s=deadline_s,
        reuse=reuse,
        constraint=constraint,
        speculation=speculation,
    )
