"""What Ray Serve runs: an engine, a front for HTTP, a gateway. Each is one process.

The work is in `replica` and `backend`; these classes have the names that Serve calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from tidegate.api.http import create_app
from tidegate.api.lifecycle import kept_alive
from tidegate.api.metrics import Metrics
from tidegate.api.settings import surface_for
from tidegate.cloud.access import written_down
from tidegate.cloud.access_settings import open_access
from tidegate.cloud.handler import LinkHandler
from tidegate.cloud.link_front import open_link
from tidegate.cloud.ray.backend import RayBackend
from tidegate.cloud.ray.handle import ServeReplicas
from tidegate.cloud.ray.loading import load_text, open_engine
from tidegate.cloud.ray.messages import Ask, ModelFacts
from tidegate.cloud.ray.replica import Part, Replica
from tidegate.cloud.ray.settings import RaySettings
from tidegate.errors import UnavailableError
from tidegate.link.prekeys import ModelOffer


class EngineDeployment:
    """One engine."""

    async def __init__(self, settings: RaySettings) -> None:  # type: ignore[misc]
        """Load the model; Serve sends no request before that is done."""
        engine, executor = await asyncio.to_thread(open_engine, settings)
        self._replica = Replica(engine, executor)
        await self._replica.start()

    async def answer(self, ask: Ask) -> AsyncGenerator[Part, None]:
        """See `Replica.answer`."""
        async with aclosing(self._replica.answer(ask)) as parts:
            async for part in parts:
                yield part

    async def facts(self) -> ModelFacts:
        """See `Replica.facts`."""
        return self._replica.facts

    async def numbers(self) -> Mapping[str, float]:
        """See `Replica.numbers`."""
        return self._replica.numbers

    async def record_routing_stats(self) -> Mapping[str, int]:
        """What routers hear of this replica each second."""
        return self._replica.loads

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        self._replica.check()

    async def __del__(self) -> None:
        """Called once no request is here any more, or the time to drain is over."""
        replica = getattr(self, "_replica", None)
        if replica is not None:
            await replica.close()


class FrontDeployment:
    """HTTP, with keys and limits, on the same code as the service of one process."""

    async def __init__(  # type: ignore[misc]
        self, settings: RaySettings, engines: DeploymentHandle
    ) -> None:
        """Wait for the model's facts, then be ready."""
        self._stack = AsyncExitStack()
        backend = await _backend(settings, engines)
        access = None
        if settings.access is not None:
            access = open_access(settings.access, key_hashes=settings.api_key_hashes)
            await self._stack.enter_async_context(written_down(access))
        surface = surface_for(settings.host, key_hashes=settings.api_key_hashes, admission=access)
        if settings.access is not None:
            surface = replace(surface, open_paths=settings.access.open_paths)
        surface = replace(surface, max_calls=settings.scale.most_queued)
        metrics = Metrics(vllm_names=settings.vllm_metrics)
        self._app = create_app(backend, settings=surface, metrics=metrics, texts=backend.text_of)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """What answers HTTP."""
        return self._app

    async def __del__(self) -> None:
        """Write down what is left to write."""
        stack = getattr(self, "_stack", None)
        if stack is not None:
            await stack.aclose()


class GatewayDeployment:
    """Sealed requests from a broker, opened here and asked like any other."""

    async def __init__(  # type: ignore[misc]
        self, settings: RaySettings, engines: DeploymentHandle
    ) -> None:
        """Open the folder of keys and begin to listen."""
        assert settings.gateway is not None, "who has no gateway does not deploy one"
        self._stack = AsyncExitStack()
        self._backend = await _backend(settings, engines)
        handler = LinkHandler(self._backend, Metrics())
        (card,) = self._backend.models()
        offer = ModelOffer(id=card.id, context_tokens=card.context_tokens)
        opened = open_link(settings.gateway, handler, lambda: (offer,))
        link = await self._stack.enter_async_context(opened)
        self._tasks = [asyncio.create_task(link.gateway.run())]
        if link.renewing is not None:
            renewal = kept_alive("certificate renewal", link.renewing.keep_own)
            self._tasks.append(asyncio.create_task(renewal()))

    async def check_health(self) -> None:
        """Serve replaces a gateway for which this raises; its store knows what is unfinished."""
        if self._tasks[0].done():
            raise UnavailableError("the gateway has ended")

    async def __del__(self) -> None:
        """Stop listening; unfinished requests stay in the store for the next one."""
        if not hasattr(self, "_tasks"):
            return
        self._backend.accepting = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()


async def _backend(settings: RaySettings, engines: DeploymentHandle) -> RayBackend:
    """Over the replicas behind `engines`, once there is one."""
    replicas = ServeReplicas(engines)
    facts = await replicas.facts()
    text = await asyncio.to_thread(load_text, settings, facts.context_tokens)
    return RayBackend(
        replicas,
        text,
        facts,
        numbers=replicas.numbers,
        anchor_blocks=settings.scale.anchor_blocks,
    )
