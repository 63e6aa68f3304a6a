"""`n` answers to one call: as many single ones side by side, each with its own index.

The first begins alone and the others once it has its first token, so the prompt is computed once
and they find its KV in the prefix cache. They run where the first one runs, on the device or in
the cloud. One that fails fails the call; closing it ends them all.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from tidegate.api.backend import Route, Routed
from tidegate.api.schema import Call, RouteWish
from tidegate.api.tools import ToolDelta
from tidegate.engine.events import Finished, TextDelta, Timing, Usage, summed

Event = Routed | TextDelta | ToolDelta | Finished
Answering = Callable[[Call], AsyncGenerator[Event, None]]
"""Answers a call once: `Routed`, texts, then `Finished`; or raises."""

_SEED_BITS = 63


def seed_of(seed: int, index: int) -> int:
    """The seed of choice `index` of a call with `seed`; the first has the call's own."""
    if index == 0:
        return seed
    digest = hashlib.sha256(f"tidegate choice {seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8]) >> (64 - _SEED_BITS)


async def side_by_side(call: Call, answer: Answering) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of all choices of a call with their index, `Routed` of the first one first.

    Every choice ends with its `Finished`, whose times count from the beginning of the call.

    Raises:
        Exception: what the first choice that failed raised.
    """
    if call.n == 1:
        async with aclosing(answer(call)) as events:
            async for event in events:
                yield 0, event
        return
    together = _Together(call, answer)
    try:
        async for index, event in together.events():
            yield index, event
    finally:
        await together.close()


class _Together:
    """The tasks of a call's choices, and the line that their events come in."""

    def __init__(self, call: Call, answer: Answering) -> None:
        self._call, self._answer = call, answer
        # Short: who reads slowly holds the choices back, as with a single one.
        self._line: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(call.n)
        self._tasks = [asyncio.create_task(self._run(0, call))]
        self._began_s = time.monotonic()

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        route: Route | None = None
        finished = 0
        while finished < self._call.n:
            index, event = await self._line.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Routed) and index == 0:
                route = event.route
            elif len(self._tasks) == 1 and route is not None:
                self._begin_others(route)
            finished += isinstance(event, Finished)
            yield index, event

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin_others(self, route: Route) -> None:
        for index in range(1, self._call.n):
            call = _choice(self._call, index, route)
            self._tasks.append(asyncio.create_task(self._run(index, call)))

    async def _run(self, index: int, call: Call) -> None:
        late_s = time.monotonic() - self._began_s if index else 0.0
        try:
            async with aclosing(self._answer(call)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        event = replace(event, timing=_later(event.timing, late_s))
                    await self._line.put((index, event))
        except Exception as error:  # the boundary of one choice: whoever reads raises it
            await self._line.put((index, error))


def _choice(call: Call, index: int, route: Route) -> Call:
    """The call of a later choice: its own seed, and the first one's place."""
    seed, wish = call.sampling.seed, call.options.route
    place: RouteWish = wish if wish != "auto" else "cloud" if route == "cloud" else "edge"
    return replace(
        call,
        sampling=replace(call.sampling, seed=None if seed is None else seed_of(seed, index)),
        options=replace(call.options, route=place),
    )


def _later(timing: Timing, seconds: float) -> Timing:
    return replace(
        timing,
        first_scheduled_s=timing.first_scheduled_s + seconds,
        first_token_s=timing.first_token_s + seconds,
        total_s=timing.total_s + seconds,
    )


def merged(ends: Sequence[Finished]) -> Finished:
    """The end of a whole call: the prompt counts once, answers and their time together."""
    first, usages = ends[0], [one.usage for one in ends]
    if len(ends) == 1:
        return first
    first_token_s = min(one.timing.first_token_s for one in ends)
    total_s = max(one.timing.total_s for one in ends)
    return Finished(
        reason=first.reason,
        usage=Usage(
            prompt_tokens=first.usage.prompt_tokens,
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=first.usage.cached_tokens,
            accepted_draft_tokens=sum(usage.accepted_draft_tokens for usage in usages),
            rejected_draft_tokens=sum(usage.rejected_draft_tokens for usage in usages),
        ),
        timing=Timing(
            first_scheduled_s=min(one.timing.first_scheduled_s for one in ends),
            first_token_s=first_token_s,
            total_s=total_s,
            decode_s=max(0.0, total_s - first_token_s),
        ),
        energy=summed(one.energy for one in ends),
    )
