"""`Replica`: one engine, answering what fronts ask. Knows nothing of Ray, which only carries it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from tidegate.api.engine_backend import EngineBackend
from tidegate.api.wire import write_event
from tidegate.cloud.ray.gathering import gap_s, gathered
from tidegate.cloud.ray.messages import Ask, ModelFacts, Refusal
from tidegate.engine.engine import Engine
from tidegate.engine.executor import Executor
from tidegate.errors import TidegateError, UnavailableError

Part = tuple[bytes, ...] | Refusal
"""Payloads of an answer, or instead of all of them why there is none."""


class Replica:
    """An engine that runs as long as this object is open.

    Args:
        engine: nobody else runs it.
        executor: what it runs on; closed in the end.
    """

    def __init__(self, engine: Engine, executor: Executor) -> None:
        self._engine, self._executor = engine, executor
        self._backend = EngineBackend(engine, route="cloud", created_s=int(time.time()))
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Let the engine run."""
        self._running = asyncio.create_task(self._engine.run())

    @property
    def facts(self) -> ModelFacts:
        """Of the model."""
        (card,) = self._backend.models()
        geometry = self._executor.kv
        return ModelFacts(
            model_id=card.id,
            context_tokens=card.context_tokens,
            created_s=card.created_s,
            block_tokens=geometry.block_tokens if geometry.kind == "paged" else None,
        )

    async def answer(self, ask: Ask) -> AsyncGenerator[Part, None]:
        """Answer one call; closing the generator ends it in the engine."""
        try:
            async with aclosing(gathered(self._payloads(ask), self._gap_s)) as messages:
                async for message in messages:
                    yield message
        except TidegateError as error:
            yield Refusal.of(error)

    async def _payloads(self, ask: Ask) -> AsyncGenerator[bytes, None]:
        events = self._backend.generate(
            ask.call, ask.prompt, ask.request_id, "asked here", join_unread=False
        )
        async with aclosing(events):
            async for event in events:
                yield write_event(event)

    def _gap_s(self) -> float:
        return gap_s(self._engine.snapshot().running)

    def check(self) -> None:
        """See whether work makes progress.

        Raises:
            UnavailableError: it does not; the process should be replaced.
        """
        if self._running is None or self._running.done() or not self._engine.snapshot().healthy:
            raise UnavailableError("the engine makes no progress")

    @property
    def loads(self) -> Mapping[str, int]:
        """Requests that run and that wait."""
        now = self._engine.snapshot()
        return {"running": now.running, "waiting": now.waiting}

    @property
    def numbers(self) -> Mapping[str, float]:
        """What the engine has counted, and what it has now."""
        now = self._engine.snapshot()
        return {
            "pid": os.getpid(),
            "running": now.running,
            "waiting": now.waiting,
            "kv_usage": now.kv_usage,
            "prefix_query_tokens": now.prefix_query_tokens,
            "prefix_hit_tokens": now.prefix_hit_tokens,
            "generated_tokens": now.generated_tokens,
            "finished": now.finished,
            "failed": now.failed,
            "cancelled": now.cancelled,
        }

    async def close(self, *, drain_s: float = 0.0) -> None:
        """Let what runs finish for so long, then end the engine and free its memory."""
        if drain_s:
            await self._engine.drain(drain_s)
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._executor.close()
