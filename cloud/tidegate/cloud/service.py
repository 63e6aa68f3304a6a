"""The cloud service: a checkpoint, the torch executor, the engine, HTTP behind a key, a gateway.

`open_cloud` builds everything; `run` serves until told to stop.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tidegate.api.engine_backend import EngineBackend
from tidegate.api.http import HttpSettings, create_app
from tidegate.api.keys import KeyRing
from tidegate.api.lifecycle import Part, run_service
from tidegate.api.metrics import Metrics
from tidegate.api.server import BoundServer
from tidegate.cloud.handler import LinkHandler
from tidegate.cloud.torch_executor import TorchExecutor, TorchSettings
from tidegate.engine.engine import Engine
from tidegate.engine.executor import Executor
from tidegate.engine.settings import EngineSettings
from tidegate.engine.text import TextModel
from tidegate.errors import ConfigError
from tidegate.link.gateway import Gateway
from tidegate.link.mqtt import MqttTransport
from tidegate.link.prekeys import ModelOffer
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.text_files import write_text_files

_TICKS_S = 0.25
"""A few of the gateway's ticks. What a slow device has not acknowledged by then is stored: it asks
for it again when there is a gateway again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewaySettings:
    """How the gateway reaches the broker."""

    broker: str
    """`mqtt://` or `mqtts://`, with the password in it if there is one: never logged."""
    keys: Path
    """The folder that the gateway's keys and its request table live in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudSettings:
    """One service."""

    checkpoint: Path
    model_id: str
    host: str = "127.0.0.1"
    port: int = 8090
    api_key_hashes: tuple[str, ...] = ()
    """SHA-256 of the keys that may call; none: the port must be private."""
    rows: int = 8
    context_tokens: int | None = None
    threads: int | None = None
    queue_limit: int = 256
    gateway: GatewaySettings | None = None
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        if self.context_tokens is not None and self.context_tokens < 1:
            raise ConfigError("context_tokens", self.context_tokens, "at least 1, or absent")


@dataclass(frozen=True, kw_only=True, eq=False)
class Cloud:
    """A service that is ready to run."""

    settings: CloudSettings
    executor: Executor
    engine: Engine
    server: BoundServer
    gateway: Gateway | None
    handler: LinkHandler

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, drain, and free everything."""
        parts: list[Part] = [] if self.gateway is None else [self.gateway.run]
        try:
            await run_service(
                engine=self.engine,
                server=self.server,
                stop=stop,
                parts=parts,
                settle=None if self.gateway is None else self._settle,
                drain_s=self.settings.drain_s,
            )
        finally:
            if self.gateway is not None:
                await self.gateway.close()
            self.executor.close()

    async def _settle(self) -> None:
        """Until the gateway has stored and sent the ends of its answers, on its next ticks."""
        await self.handler.settled()
        await asyncio.sleep(_TICKS_S)


def open_cloud(settings: CloudSettings) -> Cloud:
    """Read the checkpoint, allocate all memory, bind the port.

    Raises:
        CheckpointError: the checkpoint is damaged or of an unknown kind.
        ConfigError: a setting is out of range, or the port is taken.
        IdentityError: the gateway's keys cannot be used.
    """
    engine, executor = _open_engine(settings)
    backend, metrics = EngineBackend(engine, route="cloud", created_s=int(time.time())), Metrics()
    authorise = KeyRing(settings.api_key_hashes) if settings.api_key_hashes else None
    app = create_app(backend, settings=HttpSettings(authorise=authorise), metrics=metrics)
    handler = LinkHandler(backend, metrics)
    gateway = None
    offer = ModelOffer(id=settings.model_id, context_tokens=engine.context_tokens)
    if settings.gateway is not None:
        gateway = Gateway(
            settings.gateway.keys,
            MqttTransport(settings.gateway.broker),
            handler,
            models=lambda: (offer,),
        )
    server = BoundServer(app, settings.host, settings.port, drain_s=settings.drain_s)
    return Cloud(
        settings=settings,
        executor=executor,
        engine=engine,
        server=server,
        gateway=gateway,
        handler=handler,
    )


def _open_engine(settings: CloudSettings) -> tuple[Engine, Executor]:
    with Checkpoint.open(settings.checkpoint) as checkpoint:
        arch = checkpoint.architecture
        context = settings.context_tokens or arch.context
        executor = TorchExecutor(
            arch,
            checkpoint.weights(),
            TorchSettings(slots=settings.rows, context_tokens=context, threads=settings.threads),
        )
        with tempfile.TemporaryDirectory(prefix="tidegate-text-") as folder:
            write_text_files(checkpoint, Path(folder))
            text = TextModel.load(Path(folder), context_tokens=context)
    engine = Engine(
        executor,
        text,
        model_id=settings.model_id,
        settings=EngineSettings(most_waiting=settings.queue_limit),
    )
    return engine, executor
