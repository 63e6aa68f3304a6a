"""The device daemon: a bundle, an executor, the engine, the router, HTTP, and maybe a link.

`open_edge` builds everything and allocates all memory; `run` serves until told to stop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import cast, get_args

from tidegate.api.encoder_metrics import EncoderMetrics
from tidegate.api.encoder_model import longest_run_s
from tidegate.api.encoders import Encoders
from tidegate.api.engine_backend import EngineBackend
from tidegate.api.http import create_app
from tidegate.api.lifecycle import Part, Serving, exit_when_stuck, kept_alive, run_service
from tidegate.api.metrics import Metrics
from tidegate.api.schema import ContextPolicy
from tidegate.api.server import BoundServer
from tidegate.api.settings import surface_for
from tidegate.api.tls import ServerTls, TlsFiles
from tidegate.api.trace_settings import TraceSettings, tracing
from tidegate.edge.answer_cache import AnswerCache
from tidegate.edge.answer_memory import AnswerMemory
from tidegate.edge.cloud_leg import CloudLeg
from tidegate.edge.draft_model import open_draft
from tidegate.edge.embedder import EncoderDoor, open_classifier, open_embedder
from tidegate.edge.energy.governor import Governor
from tidegate.edge.energy.governor_open import open_governor
from tidegate.edge.energy.settings import EnergySettings
from tidegate.edge.executors.choice import ExecutorSettings, open_executor
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
from tidegate.engine.drafts_model import ModelDrafter
from tidegate.engine.engine import Engine
from tidegate.engine.executor import Executor
from tidegate.engine.prefix_disk import DiskPrefixes
from tidegate.engine.settings import EngineSettings
from tidegate.engine.steps import StepWatcher
from tidegate.engine.text import TextModel
from tidegate.errors import ConfigError
from tidegate.link.device import DeviceLink
from tidegate.link.enrolment_renewal import CertificateRenewal
from tidegate.link.key_rotation import KeyRotation
from tidegate.model.bundle import Bundle

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeSettings:
    """One daemon."""

    bundle: Path
    host: str = "127.0.0.1"
    port: int = 8080
    api_key_hashes: tuple[str, ...] = ()
    """SHA-256 of the keys that may call; without one only loopback is served."""
    tls: TlsFiles | None = None
    traces: TraceSettings | None = None
    executor: ExecutorSettings = field(default_factory=ExecutorSettings)
    queue_limit: int = 32
    """Requests that may wait for the device's engine before new ones overflow."""
    answer_cache_mib: int = 8
    answer_ttl_s: float = 600.0
    prefix_reuse: bool = True
    """Prompts that begin alike share what was computed of the beginning."""
    speculation: bool = True
    """Guess tokens ahead where that is faster; the answers are the same."""
    draft: Path | None = None
    """Bundle of a smaller model with the same tokenizer that guesses too, where that is faster."""
    prefix_cache: Path | None = None
    """A folder in which such beginnings survive a restart; None keeps them in memory only."""
    prefix_cache_mib: int = 1024
    """Of its files together; the longest unused go first."""
    embedder: Path | None = None
    """Bundle of an encoder, for `/v1/embeddings` and the semantic cache."""
    classifier: Path | None = None
    """Bundle of an encoder with labels, for `/classify`."""
    encoder_wait_s: float = 0.0
    """How long a text waits for others to be run with, while neither encoder has work."""
    semantic_cache: float | None = None
    """The cosine from which two messages share an answer; None for only identical calls."""
    trusted_signers: frozenset[str] | None = None
    """Public keys of which one must have signed the bundle; None accepts any signer, or none."""
    longest_prompt_tokens: int = 8192
    """Longer prompts are refused unread; between the device's context and this they may go out."""
    link: LinkSettings | None = None
    energy: EnergySettings | None = None
    """Schedule by energy, heat and battery; None: by the clock alone."""
    context_policy: ContextPolicy = "error"
    """For prompts that are too long, when the caller names no policy."""
    drain_s: float = 30.0
    memory_mib: int | None = None
    """What the daemon may take; None for what the system has available when it starts."""
    max_model_mib: int | None = None
    """What the weights of all bundles may take of it; None for all of it."""
    unload_after_s: float | None = None
    """Without work for so long the model leaves memory, until the next request; None: never."""
    restart_when_stuck: bool = False
    """Exit when work makes no progress, for a supervisor to start the daemon again."""

    def __post_init__(self) -> None:
        if self.queue_limit < 1:
            raise ConfigError("queue_limit", self.queue_limit, "at least 1")
        if self.context_policy not in get_args(ContextPolicy):
            allowed = f"one of {', '.join(get_args(ContextPolicy))}"
            raise ConfigError("context_policy", self.context_policy, allowed)
        if self.answer_cache_mib < 0:
            raise ConfigError("answer_cache_mib", self.answer_cache_mib, "at least 0")
        if self.prefix_cache_mib < 1:
            raise ConfigError("prefix_cache_mib", self.prefix_cache_mib, "at least 1")
        if self.memory_mib is not None and self.memory_mib < 1:
            raise ConfigError("memory_mib", self.memory_mib, "at least 1")
        if self.unload_after_s is not None and not self.unload_after_s > 0:
            raise ConfigError("unload_after_s", self.unload_after_s, "more than 0, or absent")
        if self.prefix_cache is not None and not self.prefix_reuse:
            allowed = "absent where prefixes are not reused"
            raise ConfigError("prefix_cache", str(self.prefix_cache), allowed)
        if self.draft is not None and not self.speculation:
            raise ConfigError("draft", str(self.draft), "absent where nothing is guessed")
        if self.semantic_cache is not None and self.embedder is None:
            allowed = "set together with embedder, which compares messages"
            raise ConfigError("semantic_cache", self.semantic_cache, allowed)

    def engine_settings(self) -> EngineSettings:
        """What of it is the engine's."""
        return EngineSettings(
            # Under a governor the line is its own, and what it lets begin is never refused.
            most_waiting=self.queue_limit + (self.executor.rows if self.energy else 0),
            prefix_reuse=self.prefix_reuse,
            speculation=self.speculation,
            # Several keys are several callers, who may be strangers to each other.
            shared_guesses=len(self.api_key_hashes) < 2,
            unload_after_s=self.unload_after_s,
        )


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
        link = None
        upkeep: tuple[tuple[str, Part], ...] = ()
        if settings.link is not None:
            way = settings.link.way()
            link = DeviceLink(settings.link.keys, way.transport, suites=settings.link.suites)
            stack.push_async_callback(link.close)
            upkeep = (
                ("certificate renewal", CertificateRenewal(settings.link.keys, link).run),
                ("key rotation", KeyRotation(settings.link.keys, link).run),
                ("learning gateways' URLs", partial(way.learn, link)),
            )
        executor = _open_model(bundle, settings)
        stack.callback(executor.close)
        disk = None
        if settings.prefix_cache is not None:
            budget_bytes = settings.prefix_cache_mib * _MIB
            store = open_store(settings.prefix_cache, budget_bytes=budget_bytes)
            stack.callback(store.close)
            digest = sha256(bundle.manifest.to_bytes()).digest()
            disk = DiskPrefixes(store, executor, model_digest=digest)
        cloud = None if link is None else CloudLeg(link)
        governor = None
        if settings.energy is not None:
            governor = stack.enter_context(
                open_governor(settings.energy, settings.executor, bundle, executor, cloud)
            )
            upkeep += (("scheduling by energy", governor.run),)
        drafter = None
        if settings.draft is not None:
            draft_executor, drafter = open_draft(
                settings.draft,
                bundle,
                executor.limits,
                settings.executor,
                trusted=settings.trusted_signers,
                unloading=settings.unload_after_s is not None,
            )
            stack.callback(draft_executor.close)
        watcher = None if governor is None else governor.accounts.stepped
        engine = _make_engine(bundle, executor, disk, drafter, settings, watcher)
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
    watcher: StepWatcher | None,
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
        watcher=watcher,
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
