"""The cloud service: a model, its executor, the engine, HTTP behind a key, a gateway.

`open_cloud` builds everything; `run` serves until told to stop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from tidegate.api.engine_backend import EngineBackend, encode_call, fit_sampling
from tidegate.api.http import create_app
from tidegate.api.lifecycle import Part, exit_when_stuck, kept_alive, run_service
from tidegate.api.metrics import Metrics, render_counters, render_gauge, render_paths
from tidegate.api.schema import Call
from tidegate.api.server import BoundServer
from tidegate.api.settings import surface_for
from tidegate.cloud.access import AccessControl, CallSize, written_down
from tidegate.cloud.access_settings import AccessSettings, open_access
from tidegate.cloud.executor_choice import ExecutorSettings, open_executor
from tidegate.cloud.handler import LinkHandler
from tidegate.cloud.link_front import GatewaySettings, open_link
from tidegate.cloud.link_http_server import LinkHttpServer
from tidegate.cloud.model_source import open_source
from tidegate.engine.engine import Engine
from tidegate.engine.executor import Executor
from tidegate.engine.settings import EngineSettings
from tidegate.errors import ConfigError, RequestError
from tidegate.link.enrolment_renewal import RenewingHandler
from tidegate.link.gateway import Gateway
from tidegate.link.identity import load_gateway
from tidegate.link.prekeys import ModelOffer
from tidegate.link.transport import PATHS

_TICKS_S = 0.25
"""A few of the gateway's ticks. What a slow device has not acknowledged by then is stored: it asks
for it again when there is a gateway again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudSettings:
    """One service."""

    checkpoint: Path
    """A checkpoint's folder, or a bundle's with the packed target."""
    model_id: str
    host: str = "127.0.0.1"
    port: int = 8090
    api_key_hashes: tuple[str, ...] = ()
    """SHA-256 of the keys that may call; none: the port must be private."""
    executor: ExecutorSettings = field(default_factory=ExecutorSettings)
    queue_limit: int = 256
    gateway: GatewaySettings | None = None
    drain_s: float = 30.0
    stall_after_s: float = 30.0
    """Work exists and no step ended for so long: unhealthy."""
    restart_when_stuck: bool = False
    """End the process then, for its supervisor to start it again."""
    access: AccessSettings | None = None
    """Keys with rules, limits, usage and an audit log; None: the keys above are all there is."""
    trusted: frozenset[str] | None = None
    """Public keys of which one must have signed the bundle; None for any or none."""
    vllm_metrics: bool = True
    """`/metrics` tells vLLM's names as well."""

    def __post_init__(self) -> None:
        if self.drain_s < 0:
            raise ConfigError("drain_s", self.drain_s, "at least 0")


@dataclass(frozen=True, kw_only=True, eq=False)
class Cloud:
    """A service that is ready to run."""

    settings: CloudSettings
    engine: Engine
    server: BoundServer
    gateway: Gateway | None
    http: LinkHttpServer | None
    handler: LinkHandler
    renewing: RenewingHandler | None

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain."""
        await run_service(
            engine=self.engine,
            server=self.server,
            stop=stop,
            parts=self._parts(),
            settle=None if self.gateway is None else self._settle,
            drain_s=self.settings.drain_s,
        )

    def _parts(self) -> list[Part]:
        parts: list[Part] = [] if self.gateway is None else [self.gateway.run]
        if self.renewing is not None:
            parts.append(kept_alive("certificate renewal", self.renewing.keep_own))
        if self.settings.restart_when_stuck:
            every_s = self.settings.stall_after_s / 6
            parts.append(partial(exit_when_stuck, self.engine, every_s=every_s))
        return parts

    async def _settle(self) -> None:
        """Until the gateway has stored and sent the ends of its answers, on its next ticks."""
        await self.handler.settled()
        await asyncio.sleep(_TICKS_S)


@asynccontextmanager
async def open_cloud(settings: CloudSettings) -> AsyncIterator[Cloud]:
    """Read the model, allocate all memory, bind the port; close it all in the end.

    Raises:
        BundleError: the bundle is damaged, not trusted, or was converted for devices only.
        CheckpointError: the checkpoint is damaged or of an unknown kind.
        ConfigError: a setting is out of range, the port is taken, or strangers could reach it.
        IdentityError: the gateway's keys cannot be used.
    """
    async with AsyncExitStack() as stack:
        access = None
        if settings.access is not None:
            access = open_access(settings.access, key_hashes=settings.api_key_hashes)
            await stack.enter_async_context(written_down(access))
        surface = surface_for(settings.host, key_hashes=settings.api_key_hashes, admission=access)
        if settings.access is not None:
            surface = replace(surface, open_paths=settings.access.open_paths)
        if settings.gateway is not None:
            load_gateway(settings.gateway.keys)  # before a file is made there, and in no time
        engine, executor = open_engine(settings)
        stack.callback(executor.close)
        metrics = Metrics(vllm_names=settings.vllm_metrics)
        backend = CloudBackend(engine, created_s=int(time.time()))
        if access is not None:
            access.size, backend.access = backend.size_of, access
        handler = LinkHandler(backend, metrics)
        renewing = None
        if settings.gateway is not None:
            offer = ModelOffer(id=engine.model_id, context_tokens=engine.context_tokens)
            link = await stack.enter_async_context(open_link(settings.gateway, handler, offer))
            backend.gateway, backend.http, renewing = link.gateway, link.http, link.renewing
        app = create_app(backend, settings=surface, metrics=metrics, texts=backend.text_of)
        server = BoundServer(app, settings.host, settings.port, drain_s=settings.drain_s)
        stack.callback(server.close)
        yield Cloud(
            settings=settings,
            engine=engine,
            server=server,
            gateway=backend.gateway,
            http=backend.http,
            handler=handler,
            renewing=renewing,
        )


class CloudBackend(EngineBackend):
    """The engine as a backend, with what its gateway counted."""

    def __init__(self, engine: Engine, *, created_s: int) -> None:
        """Serve `engine`; `gateway` and `http` are set once there are any."""
        super().__init__(engine, route="cloud", created_s=created_s)
        self.gateway: Gateway | None = None
        self.http: LinkHttpServer | None = None
        self.access: AccessControl | None = None

    async def size_of(self, call: Call) -> CallSize:
        """What `call` comes to at most; a prompt that is too long is refused, or cut, later."""
        engine = self.engine
        try:
            prompt_tokens = len(await encode_call(engine.text, call))
        except RequestError as error:
            if error.status != 413:
                raise
            prompt_tokens = engine.context_tokens
        fitted = fit_sampling(call.sampling, prompt_tokens, engine.context_tokens)
        return CallSize(
            model=call.model or engine.model_id,
            prompt_tokens=prompt_tokens,
            answer_tokens=call.n * fitted.max_tokens,
        )

    async def status(self) -> Mapping[str, object]:
        """See `Backend.status`."""
        link = None
        if self.gateway is not None:
            link = {
                "connected": self.gateway.connected,
                "broker": self.gateway.status,
                "path": self.gateway.path,
                "http": None if self.http is None else self.http.report(),
                "counters": asdict(self.gateway.counters),
            }
        return {"engine": await super().status(), "link": link}

    def metrics(self) -> bytes:
        """See `Backend.metrics`."""
        found = super().metrics()
        if self.access is not None:
            found += self.access.metrics.render()
        if self.gateway is None:
            return found
        text = render_counters("tidegate_link", asdict(self.gateway.counters))
        text += render_paths("tidegate_link", self.gateway.path.split("+"), known=PATHS)
        devices = 0 if self.http is None else len(self.http.hub.handles)
        text += render_gauge("tidegate_link_http_devices", devices, "Devices that read over HTTP.")
        return found + text


def open_engine(settings: CloudSettings) -> tuple[Engine, Executor]:
    """The engine of a service, and its executor, which the caller closes.

    Raises:
        BundleError: the bundle is damaged, not trusted, or was converted for devices only.
        CheckpointError: the checkpoint is damaged or of an unknown kind.
        ConfigError: a size is out of range.
    """
    with open_source(settings.checkpoint, trusted=settings.trusted) as source:
        executor = open_executor(source.arch, source.weights, settings.executor)
        text = source.text(context_tokens=executor.limits.context_tokens)
    engine = Engine(
        executor,
        text,
        model_id=settings.model_id,
        settings=EngineSettings(
            most_waiting=settings.queue_limit,
            shared_guesses=False,
            stall_after_s=settings.stall_after_s,
        ),
    )
    return engine, executor
