"""The device daemon: a bundle, an executor, the engine, the router, HTTP, and maybe a link.

`open_edge` builds everything and allocates all memory; `run` serves until told to stop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import cast

from tidegate.api.encoder_metrics import EncoderMetrics
from tidegate.api.encoder_model import longest_run_s
from tidegate.api.encoders import Encoders
from tidegate.api.engine_backend import EngineBackend
from tidegate.api.http import create_app
from tidegate.api.lifecycle import Part, Serving, exit_when_stuck, kept_alive, run_service
from tidegate.api.metrics import Metrics
from tidegate.api.server import BoundServer
from tidegate.api.settings import surface_for
from tidegate.api.tls import ServerTls
from tidegate.api.trace_settings import tracing
from tidegate.edge.answer_cache import AnswerCache
from tidegate.edge.answer_memory import AnswerMemory
from tidegate.edge.cloud_leg import CloudLeg
from tidegate.edge.draft_model import open_draft
from tidegate.edge.embedder import EncoderDoor, open_classifier, open_embedder
from tidegate.edge.energy.governor import Governor
from tidegate.edge.energy.governor_open import open_governor
from tidegate.edge.executors.choice import open_executor
from tidegate.edge.executors.encoder import EncoderSettings
from tidegate.edge.governed import GovernedEngine
from tidegate.edge.link_answers import answer_routes
from tidegate.edge.link_settings import LinkSettings
from tidegate.edge.memory import MemoryNeed
from tidegate.edge.memory_of_settings import check_settings
from tidegate.edge.prefix_store import open_store
from tidegate.edge.residency import (
    DeviceExecutor,
    ResidentExecutor,
    give_back_freed,
    give_back_mapped,
    open_again,
)
from tidegate.edge.semantic_cache import SemanticCache
from tidegate.edge.service import EdgeBackend
from tidegate.edge.settings import EdgeSettings
from tidegate.engine.drafts_model import ModelDrafter
from tidegate.engine.engine import Engine
from tidegate.engine.executor import Executor
from tidegate.engine.prefix_disk import DiskPrefixes
from tidegate.engine.text import TextModel
from tidegate.link.device import DeviceLink
from tidegate.link.enrolment_renewal import CertificateRenewal
from tidegate.link.key_rotation import KeyRotation
from tidegate.model.bundle import Bundle

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Edge:
    """A daemon that is ready to run."""

    settings: EdgeSettings
    engine: Engine
    encoders: Encoders
    server: BoundServer
    link: DeviceLink | None
    upkeep: tuple[tuple[str, Part], ...]
    """Parts that look after the link's keys, with their names."""
    governor: Governor | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain. Without its link a device still answers."""
        parts: list[Part] = []
        if self.link is not None:
            parts.append(kept_alive("the link", self.link.run))
        parts += [kept_alive(name, part) for name, part in self.upkeep]
        if self.settings.restart_when_stuck:
            parts += [partial(exit_when_stuck, one) for one in (self.engine, self.encoders)]
        engine: Serving = self.engine
        if self.governor is not None:
            engine = GovernedEngine(engine=self.engine, governor=self.governor)
        await run_service(
            engine=engine,
            server=self.server,
            stop=stop,
            parts=parts,
            drain_s=self.settings.drain_s,
        )


@asynccontextmanager
async def open_edge(settings: EdgeSettings) -> AsyncIterator[Edge]:
    """Verify the bundle, load the model, bind the port; close it all in the end.

    Raises:
        BundleError: the bundle is damaged or was not made for the wanted executor.
        ConfigError: a setting is out of range, the port is taken, or strangers could reach it.
        IdentityError: the link's keys cannot be used.
    """
    tls = None if settings.tls is None else ServerTls(settings.tls)
    mutual = tls is not None and tls.mutual
    surface = surface_for(settings.host, key_hashes=settings.api_key_hashes, mutual_tls=mutual)
    bundle = Bundle.open(settings.bundle, trusted=settings.trusted_signers, every_target=False)
    memory = check_settings(bundle, settings)
    async with AsyncExitStack() as stack:
        if settings.traces is not None:
            tracer = await stack.enter_async_context(tracing(settings.traces))
            surface = replace(surface, tracer=tracer)
        link, upkeep = _open_link(settings.link, stack)
        executor = _open_model(bundle, settings)
        stack.callback(executor.close)
        disk = _open_disk(bundle, executor, settings, stack)
        cloud = None if link is None else CloudLeg(link)
        governor = None
        if settings.energy is not None:
            governor = stack.enter_context(
                open_governor(settings.energy, settings.executor, bundle, executor, cloud)
            )
            upkeep += (("scheduling by energy", governor.run),)
        drafter = _open_drafter(bundle, executor, settings, stack)
        engine = _make_engine(bundle, executor, disk, drafter, settings, governor)
        encoders = _open_encoders(settings, stack)
        backend = _make_backend(engine, executor, cloud, encoders, memory, settings, governor)
        answers = [] if link is None else answer_routes(link)
        metrics = Metrics()
        if tls is not None:
            metrics.watch_certificate(lambda: tls.expires_s)
            upkeep += (("the certificate", tls.run),)
        app = create_app(
            backend,
            settings=surface,
            encoders=encoders,
            metrics=metrics,
            texts=backend.text_of,
            extra_routes=answers,
        )
        context = None if tls is None else tls.context
        server = BoundServer(
            app, settings.host, settings.port, drain_s=settings.drain_s, tls=context
        )
        stack.callback(server.close)
        yield Edge(
            settings=settings,
            engine=engine,
            encoders=encoders,
            server=server,
            link=link,
            upkeep=upkeep,
            governor=governor,
        )


_Upkeep = tuple[tuple[str, Part], ...]


def _open_link(
    settings: LinkSettings | None, stack: AsyncExitStack
) -> tuple[DeviceLink | None, _Upkeep]:
    """The link, closed with `stack`, and what looks after its keys."""
    if settings is None:
        return None, ()
    way = settings.way()
    link = DeviceLink(settings.keys, way.transport, suites=settings.suites)
    stack.push_async_callback(link.close)
    return link, (
        ("certificate renewal", CertificateRenewal(settings.keys, link).run),
        ("key rotation", KeyRotation(settings.keys, link).run),
        ("learning gateways' URLs", partial(way.learn, link)),
    )


def _open_disk(
    bundle: Bundle, executor: DeviceExecutor, settings: EdgeSettings, stack: AsyncExitStack
) -> DiskPrefixes | None:
    """Where prefixes survive, closed with `stack`."""
    if settings.prefix_cache is None:
        return None
    store = open_store(settings.prefix_cache, budget_bytes=settings.prefix_cache_mib * _MIB)
    stack.callback(store.close)
    digest = sha256(bundle.manifest.to_bytes()).digest()
    return DiskPrefixes(store, executor, model_digest=digest)


def _open_drafter(
    bundle: Bundle, executor: DeviceExecutor, settings: EdgeSettings, stack: AsyncExitStack
) -> ModelDrafter | None:
    """The smaller model that guesses, closed with `stack`."""
    if settings.draft is None:
        return None
    draft_executor, drafter = open_draft(
        settings.draft,
        bundle,
        executor.limits,
        settings.executor,
        trusted=settings.trusted_signers,
        unloading=settings.unload_after_s is not None,
    )
    stack.callback(draft_executor.close)
    return drafter


def _open_model(bundle: Bundle, settings: EdgeSettings) -> DeviceExecutor:
    def load(verified: Bundle) -> DeviceExecutor:
        executor = cast(DeviceExecutor, open_executor(verified, settings.executor))
        give_back_mapped(verified.folder)
        give_back_freed()  # what compiling the model took
        return executor

    first = load(bundle)
    if settings.unload_after_s is None:
        return first
    return ResidentExecutor(first, lambda: load(open_again(bundle, settings.trusted_signers)))


def _make_engine(
    bundle: Bundle,
    executor: Executor,
    disk: DiskPrefixes | None,
    drafter: ModelDrafter | None,
    settings: EdgeSettings,
    governor: Governor | None,
) -> Engine:
    text = TextModel.load(
        bundle.folder,
        context_tokens=max(settings.longest_prompt_tokens, executor.limits.context_tokens),
    )
    return Engine(
        executor,
        text,
        model_id=bundle.manifest.model_id,
        settings=settings.engine_settings(),
        disk=disk,
        draft_model=drafter,
        watcher=None if governor is None else governor.accounts.stepped,
        ended=None if governor is None else governor.computed,
    )


def _make_backend(
    engine: Engine,
    executor: Executor,
    cloud: CloudLeg | None,
    encoders: Encoders,
    memory: MemoryNeed,
    settings: EdgeSettings,
    governor: Governor | None,
) -> EdgeBackend:
    return EdgeBackend(
        EngineBackend(engine, route="edge", created_s=int(time.time())),
        cloud=cloud,
        memory=_make_memory(encoders, settings),
        batch_rows=executor.limits.step_rows,
        queue_limit=settings.queue_limit,
        context_policy=settings.context_policy,
        needed_bytes=memory.to_json(),
        governor=governor,
    )


def _open_encoders(settings: EdgeSettings, stack: AsyncExitStack) -> Encoders:
    """Those beside the model, closed with `stack`."""
    door = EncoderDoor(
        settings=EncoderSettings(
            choice=settings.executor.choice,
            threads=settings.executor.threads,
            exact=settings.executor.exact,
        ),
        created_s=int(time.time()),
        wait_s=settings.encoder_wait_s,
        trusted=settings.trusted_signers,
        metrics=EncoderMetrics(),
    )
    embedders, classifiers = [], []
    if settings.embedder is not None:
        embedders.append(open_embedder(settings.embedder, door))
        stack.callback(embedders[0].close)
    if settings.classifier is not None:
        classifiers.append(open_classifier(settings.classifier, door))
        stack.callback(classifiers[0].close)
    return Encoders(
        embedders=embedders,
        classifiers=classifiers,
        metrics=door.metrics,
        busy_s=partial(longest_run_s, (*embedders, *classifiers)),
    )


def _make_memory(encoders: Encoders, settings: EdgeSettings) -> AnswerMemory:
    budget_bytes = settings.answer_cache_mib * _MIB
    exact = AnswerCache(
        budget_bytes=budget_bytes, ttl_s=settings.answer_ttl_s, clock=time.monotonic
    )
    if settings.semantic_cache is None:
        return AnswerMemory(exact)
    semantic = SemanticCache(
        similarity=settings.semantic_cache,
        budget_bytes=budget_bytes,
        ttl_s=settings.answer_ttl_s,
        clock=time.monotonic,
    )
    return AnswerMemory(exact, semantic, encoders.embedders[0])
