"""The device daemon: a bundle, an executor, the engine, the router, HTTP, and maybe a link.

`open_edge` builds everything and allocates all memory; `run` serves until told to stop.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

from tidegate.api.engine_backend import EngineBackend
from tidegate.api.http import HttpSettings, create_app
from tidegate.api.lifecycle import Part, run_service
from tidegate.api.server import BoundServer
from tidegate.edge.answer_cache import AnswerCache
from tidegate.edge.cloud_leg import CloudLeg
from tidegate.edge.executors.choice import ExecutorSettings, open_executor
from tidegate.edge.service import EdgeBackend
from tidegate.engine.engine import Engine
from tidegate.engine.executor import Executor
from tidegate.engine.settings import EngineSettings
from tidegate.engine.text import TextModel
from tidegate.errors import ConfigError
from tidegate.link.device import DeviceLink
from tidegate.link.mqtt import MqttTransport
from tidegate.model.bundle import Bundle

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkSettings:
    """How a device reaches its gateways."""

    broker: str
    """`mqtt://` or `mqtts://`, with the password in it if there is one: never logged."""
    keys: Path
    """The folder that the device's keys and outbox live in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeSettings:
    """One daemon."""

    bundle: Path
    host: str = "127.0.0.1"
    port: int = 8080
    executor: ExecutorSettings = field(default_factory=ExecutorSettings)
    queue_limit: int = 32
    """Requests that may wait for the device's engine before new ones overflow."""
    answer_cache_mib: int = 8
    answer_ttl_s: float = 600.0
    longest_prompt_tokens: int = 8192
    """Longer prompts are refused unread; between the device's context and this they may go out."""
    link: LinkSettings | None = None
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        if self.queue_limit < 1:
            raise ConfigError("queue_limit", self.queue_limit, "at least 1")
        if self.answer_cache_mib < 0:
            raise ConfigError("answer_cache_mib", self.answer_cache_mib, "at least 0")


@dataclass(frozen=True, kw_only=True, eq=False)
class Edge:
    """A daemon that is ready to run."""

    settings: EdgeSettings
    executor: Executor
    engine: Engine
    server: BoundServer
    link: DeviceLink | None

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, drain, and free everything."""
        parts: list[Part] = [] if self.link is None else [self.link.run]
        try:
            await run_service(
                engine=self.engine,
                server=self.server,
                stop=stop,
                parts=parts,
                drain_s=self.settings.drain_s,
            )
        finally:
            if self.link is not None:
                await self.link.close()
            self.executor.close()


def open_edge(settings: EdgeSettings) -> Edge:
    """Verify the bundle, load the model, bind the port.

    Raises:
        BundleError: the bundle is damaged or was not made for the wanted executor.
        ConfigError: a setting is out of range, or the port is taken.
        IdentityError: the link's keys cannot be used.
    """
    bundle = Bundle.open(settings.bundle)
    link = None if settings.link is None else _open_link(settings.link)
    executor = open_executor(bundle, settings.executor)
    text = TextModel.load(
        bundle.folder,
        context_tokens=max(settings.longest_prompt_tokens, executor.limits.context_tokens),
    )
    engine = Engine(
        executor,
        text,
        model_id=bundle.manifest.model_id,
        settings=EngineSettings(most_waiting=settings.queue_limit),
    )
    backend = EdgeBackend(
        EngineBackend(engine, route="edge", created_s=int(time.time())),
        cloud=None if link is None else CloudLeg(link),
        cache=AnswerCache(
            budget_bytes=settings.answer_cache_mib * _MIB,
            ttl_s=settings.answer_ttl_s,
            clock=time.monotonic,
        ),
        batch_rows=executor.limits.step_rows,
        queue_limit=settings.queue_limit,
    )
    app = create_app(backend, settings=HttpSettings(status=True))
    server = BoundServer(app, settings.host, settings.port, drain_s=settings.drain_s)
    return Edge(settings=settings, executor=executor, engine=engine, server=server, link=link)


def _open_link(settings: LinkSettings) -> DeviceLink:
    return DeviceLink(settings.keys, MqttTransport(settings.broker))
