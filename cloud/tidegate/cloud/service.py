"""The cloud service: models in a pool, HTTP behind a key, a gateway.

`open_cloud` builds everything; `run` serves until told to stop. `open_app` goes without the socket,
for who brings a server of their own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from starlette.applications import Starlette

from tidegate.api.encoder_metrics import EncoderMetrics
from tidegate.api.http import create_app
from tidegate.api.lifecycle import Part, exit_when_stuck, kept_alive, run_service
from tidegate.api.metrics import Metrics
from tidegate.api.server import BoundServer
from tidegate.api.settings import HttpSettings, surface_for
from tidegate.api.tls import ServerTls, TlsFiles
from tidegate.api.trace_settings import TraceSettings, tracing
from tidegate.cloud.access import AccessControl, written_down
from tidegate.cloud.access_settings import AccessSettings, open_access
from tidegate.cloud.cloud_backend import CloudBackend
from tidegate.cloud.encoders import EncoderModels, EncodersSettings
from tidegate.cloud.gpu_memory import LEFT_ALONE
from tidegate.cloud.handler import LinkHandler
from tidegate.cloud.host_memory import available_bytes
from tidegate.cloud.language_model import LanguageModels
from tidegate.cloud.link_front import GatewaySettings, LinkFront, open_link
from tidegate.cloud.link_http_server import LinkHttpServer
from tidegate.cloud.model_settings import PoolSettings
from tidegate.cloud.model_updates import Mode
from tidegate.cloud.pooled_encoders import encoders_of
from tidegate.cloud.pooled_model import Place
from tidegate.cloud.reload import Reloader, reload_route
from tidegate.cloud.served_models import Models, ServedModels, with_encoders
from tidegate.errors import ConfigError
from tidegate.link.identity import load_gateway

_TICKS_S = 0.25
"""A few of the gateway's ticks. What a slow device has not acknowledged by then is stored: it asks
for it again when there is a gateway again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudSettings:
    """One service."""

    models: PoolSettings
    update: Mode = "beside"
    """How a reload replaces models in memory."""
    host: str = "127.0.0.1"
    port: int = 8090
    api_key_hashes: tuple[str, ...] = ()
    """SHA-256 of the keys that may call; none: the port must be private."""
    gateway: GatewaySettings | None = None
    drain_s: float = 30.0
    stall_after_s: float = 30.0
    """Work exists and no step ended for so long: unhealthy."""
    restart_when_stuck: bool = False
    """End the process then, for its supervisor to start it again."""
    access: AccessSettings | None = None
    """Keys with rules, limits, usage and an audit log; None: the keys above are all there is."""
    encoders: EncodersSettings = field(default_factory=EncodersSettings)
    """Beside the model, for `/v1/embeddings` and `/classify`."""
    trusted: frozenset[str] | None = None
    """Public keys of which one must have signed each bundle; None for any or none."""
    tls: TlsFiles | None = None
    """What HTTPS is served with; None serves HTTP."""
    traces: TraceSettings | None = None
    """Where spans go; None makes none."""
    vllm_metrics: bool = True
    """`/metrics` tells vLLM's names as well."""

    def __post_init__(self) -> None:
        if self.drain_s < 0:
            raise ConfigError("drain_s", self.drain_s, "at least 0")


@dataclass(frozen=True, kw_only=True, eq=False)
class CloudApp:
    """A service without a socket; `parts` are to be kept running."""

    settings: CloudSettings
    pool: Models
    backend: CloudBackend
    reloader: Reloader
    app: Starlette
    handler: LinkHandler
    link: LinkFront | None
    tls: ServerTls | None = None

    def parts(self) -> list[Part]:
        """What runs beside the models and the HTTP server."""
        parts: list[Part] = []
        if self.link is not None:
            parts.append(self.link.gateway.run)
            if self.link.renewing is not None:
                parts.append(kept_alive("certificate renewal", self.link.renewing.keep_own))
        if self.tls is not None:
            parts.append(self.tls.run)
        if self.settings.restart_when_stuck:
            every_s = self.settings.stall_after_s / 6
            parts.append(partial(exit_when_stuck, self.backend, every_s=every_s))
        return parts

    async def settle(self) -> None:
        """Until the gateway has stored and sent the ends of its answers, on its next ticks."""
        await self.handler.settled()
        await asyncio.sleep(_TICKS_S)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cloud:
    """A service that is ready to run."""

    inside: CloudApp
    server: BoundServer

    @property
    def http(self) -> LinkHttpServer | None:
        """Where devices are met over HTTP."""
        return None if self.inside.link is None else self.inside.link.http

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain."""
        inside = self.inside
        await run_service(
            engine=inside.pool,
            server=self.server,
            stop=stop,
            parts=[inside.reloader.on_signals, *inside.parts()],
            settle=None if inside.link is None else inside.settle,
            drain_s=inside.settings.drain_s,
        )


@asynccontextmanager
async def open_cloud(
    settings: CloudSettings, *, reread: Callable[[], CloudSettings] | None = None
) -> AsyncIterator[Cloud]:
    """Load what is loaded at start, bind the port; close it all in the end.

    Args:
        settings: of the service.
        reread: reads them again for a reload; None where they cannot change.

    Raises:
        BundleError: a bundle is damaged, not trusted, or was converted for devices only.
        CheckpointError: a checkpoint is damaged or of an unknown kind.
        ConfigError: a setting is out of range, the port is taken, or strangers could reach it.
        IdentityError: the gateway's keys cannot be used.
    """
    async with open_app(settings, reread=reread) as inside:
        context = None if inside.tls is None else inside.tls.context
        server = BoundServer(
            inside.app, settings.host, settings.port, drain_s=settings.drain_s, tls=context
        )
        try:
            yield Cloud(inside=inside, server=server)
        finally:
            server.close()


@asynccontextmanager
async def open_app(
    settings: CloudSettings, *, reread: Callable[[], CloudSettings] | None = None
) -> AsyncIterator[CloudApp]:
    """As `open_cloud`, without a port of its own; models answer while the block runs.

    Raises:
        BundleError: a bundle is damaged, not trusted, or was converted for devices only.
        CheckpointError: a checkpoint is damaged or of an unknown kind.
        ConfigError: a setting is out of range, or strangers could reach it.
        IdentityError: the gateway's keys cannot be used.
    """
    async with AsyncExitStack() as stack:
        access = await _opened_access(settings, stack)
        tls = None if settings.tls is None else ServerTls(settings.tls)
        surface = await _surface(settings, access, tls, stack)
        if settings.gateway is not None:
            load_gateway(settings.gateway.keys)  # before a file is made there, and in no time
        created_s, encoder_metrics = int(time.time()), EncoderMetrics()
        pool = await _opened_pool(settings, encoder_metrics, stack)
        encoders = encoders_of(pool, encoder_metrics, created_s=created_s)
        metrics = Metrics(vllm_names=settings.vllm_metrics)
        if tls is not None:
            metrics.watch_certificate(lambda: tls.expires_s)
        backend = CloudBackend(pool, created_s=created_s, encoders=encoders)
        backend.access = access
        handler = LinkHandler(backend, metrics, tracer=surface.tracer, books=access)
        link = None
        if settings.gateway is not None:
            opened = open_link(settings.gateway, handler, backend.offers)
            link = await stack.enter_async_context(opened)
            backend.gateway, backend.http = link.gateway, link.http
        reloader = Reloader(pool, settings, partial(_beside_encoders, settings, reread))
        app = create_app(
            backend,
            settings=surface,
            metrics=metrics,
            encoders=encoders,
            texts=backend.text_of,
            extra_routes=[reload_route(reloader, surface)],
        )
        yield CloudApp(
            settings=settings,
            pool=pool,
            backend=backend,
            reloader=reloader,
            app=app,
            handler=handler,
            link=link,
            tls=tls,
        )


async def _opened_access(settings: CloudSettings, stack: AsyncExitStack) -> AccessControl | None:
    """Who looks after keys; `stack` writes down and closes it."""
    if settings.access is None:
        return None
    access = open_access(settings.access, key_hashes=settings.api_key_hashes)
    await stack.enter_async_context(written_down(access))
    return access


async def _surface(
    settings: CloudSettings,
    access: AccessControl | None,
    tls: ServerTls | None,
    stack: AsyncExitStack,
) -> HttpSettings:
    """What the HTTP surface asks of callers, and where it traces, for as long as `stack` is."""
    surface = surface_for(
        settings.host,
        key_hashes=settings.api_key_hashes,
        admission=access,
        mutual_tls=tls is not None and tls.mutual,
    )
    if settings.access is not None:
        surface = replace(surface, open_paths=settings.access.open_paths)
    if settings.traces is not None:
        tracer = await stack.enter_async_context(tracing(settings.traces))
        surface = replace(surface, tracer=tracer)
    return surface


async def _opened_pool(
    settings: CloudSettings, metrics: EncoderMetrics, stack: AsyncExitStack
) -> Models:
    """All models in one pool, which is started; `stack` closes it."""
    text = LanguageModels(trusted=settings.trusted, stall_after_s=settings.stall_after_s)
    maker = ServedModels(text, EncoderModels(settings.encoders, metrics))
    pool = Models(with_encoders(settings.models, settings.encoders), maker, budget)
    stack.push_async_callback(pool.close)
    await pool.start()
    return pool


def _beside_encoders(
    settings: CloudSettings, reread: Callable[[], CloudSettings] | None
) -> CloudSettings:
    """What is written now, with the encoders that are here: further ones take a restart."""
    now = settings if reread is None else reread()
    return replace(now, models=with_encoders(now.models, settings.encoders))


def budget(place: Place) -> int | None:
    """What several models may take together where nothing else was said."""
    if place == "gpu":
        import torch

        free_bytes, _ = torch.cuda.mem_get_info()
        return int(free_bytes * (1 - LEFT_ALONE))
    found = available_bytes()
    return None if found is None else int(found * (1 - LEFT_ALONE))
