"""`LanguageModel`: a model on its executor with its engine, as a pool keeps it in memory."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Final

from tidegate.api.backend import AnswerEvent, Routed
from tidegate.api.engine_backend import EngineBackend
from tidegate.api.schema import Call
from tidegate.cloud.adapter_book import AdapterBook, adapter_bytes
from tidegate.cloud.executor_choice import ExecutorSettings, Watched, chosen, open_executor
from tidegate.cloud.gpu_memory import MemoryPart, MemorySum
from tidegate.cloud.model_memory import torch_memory
from tidegate.cloud.model_settings import AdapterSettings, ModelSettings
from tidegate.cloud.model_source import open_source, source_facts
from tidegate.cloud.pool_room import MIB
from tidegate.cloud.pooled_model import ModelFacts
from tidegate.engine.adapting import Adapting
from tidegate.engine.engine import Engine
from tidegate.engine.events import Failed, Finished
from tidegate.engine.executor import Executor
from tidegate.engine.request import GenerationRequest, RequestId, SamplingParams
from tidegate.engine.settings import EngineSettings
from tidegate.errors import ConfigError, UnavailableError

_PROBE: Final = (0,)
"""Every vocabulary has a first token."""
STALL_AFTER_S: Final = EngineSettings().stall_after_s


class LanguageModel:
    """See `tidegate.cloud.pooled_model.PooledModel`."""

    def __init__(
        self, executor: Executor, engine: Engine, adapters: AdapterBook | None = None
    ) -> None:
        """Serve `engine`, which runs on `executor`; without `adapters` the model alone."""
        self._executor, self.engine, self.adapters = executor, engine, adapters
        self.backend = EngineBackend(engine, route="cloud", created_s=int(time.time()))

    async def run(self) -> None:
        """See `PooledModel.run`."""
        if not isinstance(self._executor, Watched):
            await self.engine.run()
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.engine.run())
            tasks.create_task(self._executor.watch())

    async def drain(self, timeout_s: float) -> bool:
        """See `PooledModel.drain`."""
        return await self.engine.drain(timeout_s)

    def close(self) -> None:
        """See `PooledModel.close`."""
        self._executor.close()

    async def probe(self) -> None:
        """See `PooledModel.probe`: one token after one token."""
        request = GenerationRequest(
            id=RequestId(f"probe-{secrets.token_hex(8)}"),
            prompt=_PROBE,
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
            reuse=False,
            speculation=False,
        )
        async with aclosing(self.engine.submit(request)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return
                if isinstance(event, Failed):
                    raise UnavailableError(f"the first step of the model failed: {event.message}")
        raise UnavailableError("the model did not answer")

    def answer(
        self, call: Call, request_id: str, *, join_unread: bool
    ) -> AsyncGenerator[AnswerEvent, None]:
        """The events of one call; which model it names was seen to before."""
        return self.backend.answer_as(call, request_id, join_unread=join_unread)

    async def answer_adapted(
        self,
        call: Call,
        request_id: str,
        adapter: AdapterSettings,
        version: str,
        *,
        join_unread: bool,
    ) -> AsyncGenerator[AnswerEvent, None]:
        """The same with an adapter, under its name.

        Raises:
            CapacityError: as many adapters as may be in memory are in use.
            UnavailableError: the adapter cannot be read any more.
        """
        assert self.adapters is not None, "a model with adapters was loaded with a book of them"
        async with self.adapters.use(adapter, version) as number:
            answer = self.backend.answer_as(
                call, request_id, join_unread=join_unread, adapter=number
            )
            async with aclosing(answer) as events:
                async for event in events:
                    if isinstance(event, Routed):
                        event = replace(event, model=adapter.name)
                    yield event


class LanguageModels:
    """`tidegate.cloud.pooled_model.Maker` of checkpoints and packed bundles."""

    def __init__(
        self, *, trusted: Collection[str] | None = None, stall_after_s: float = STALL_AFTER_S
    ) -> None:
        """Make models as `open_engine` does."""
        self._trusted, self._stall_after_s = trusted, stall_after_s

    def describe(self, settings: ModelSettings) -> ModelFacts:
        """See `Maker.describe`.

        Raises:
            BundleError: the bundle is damaged, not trusted, or was converted for devices only.
            CheckpointError: the checkpoint is damaged or of an unknown kind.
            ConfigError: a setting does not fit it.
        """
        place = chosen(settings.executor.choice)
        source = source_facts(settings.path, trusted=self._trusted)
        arch = source.arch
        context = settings.executor.context_tokens or arch.context
        if context > arch.context:
            raise ConfigError("context_tokens", context, f"at most {arch.context}")
        sizes = sorted(adapter_bytes(one, source) for one in settings.adapters)
        if place == "gpu":
            if settings.adapters:
                raise _no_adapters("gpu", settings)
            memory = _given(settings.executor)
        else:
            memory = torch_memory(arch, settings.executor, packed_bytes=source.packed_bytes)
            if sizes:
                largest = sum(sizes[-settings.most_adapters :])
                part = MemoryPart(
                    name=f"adapters, {settings.most_adapters} at once", nbytes=largest
                )
                memory = MemorySum(parts=(*memory.parts, part))
        return ModelFacts(
            context_tokens=context,
            place="gpu" if place == "gpu" else "host",
            memory=memory,
            version=version_of(
                settings.path,
                settings.executor,
                settings.queue_limit,
                settings.most_adapters,
                bool(settings.adapters),
            ),
            adapters={one.name: version_of(one.path, one.sha256) for one in settings.adapters},
        )

    def load(self, settings: ModelSettings, facts: ModelFacts) -> LanguageModel:
        """See `Maker.load`.

        Raises:
            BundleError: as for `describe`.
            CheckpointError: as for `describe`.
            ConfigError: as for `describe`.
        """
        engine, executor = open_engine(
            settings, trusted=self._trusted, stall_after_s=self._stall_after_s
        )
        if not settings.adapters:
            return LanguageModel(executor, engine)
        if not isinstance(executor, Adapting):
            executor.close()
            raise _no_adapters(type(executor).__name__, settings)
        source = source_facts(settings.path, trusted=self._trusted)
        book = AdapterBook(executor, source.arch, source.sources, most=settings.most_adapters)
        return LanguageModel(executor, engine, book)


def _no_adapters(executor: str, settings: ModelSettings) -> ConfigError:
    names = ", ".join(one.name for one in settings.adapters)
    allowed = (
        f"absent on executor {executor}, which cannot add adapters: take executor torch, or merge"
        " them (tidegate convert --lora)"
    )
    return ConfigError("adapter", names, allowed)


def open_engine(
    settings: ModelSettings,
    *,
    trusted: Collection[str] | None = None,
    stall_after_s: float = STALL_AFTER_S,
) -> tuple[Engine, Executor]:
    """The engine of a model, and its executor, which the caller closes.

    Args:
        settings: which model, and its sizes.
        trusted: see `tidegate.cloud.model_source.open_source`.
        stall_after_s: see `EngineSettings.stall_after_s`.

    Raises:
        BundleError: the bundle is damaged, not trusted, or was converted for devices only.
        CheckpointError: the checkpoint is damaged or of an unknown kind.
        ConfigError: a size is out of range.
    """
    with open_source(settings.path, trusted=trusted) as source:
        executor = open_executor(
            source.arch, source.weights, settings.executor, origin=source.origin
        )
        try:
            engine = Engine(
                executor,
                source.text(context_tokens=executor.limits.context_tokens),
                model_id=settings.name,
                settings=EngineSettings(
                    most_waiting=settings.queue_limit,
                    shared_guesses=False,
                    stall_after_s=stall_after_s,
                ),
            )
        except BaseException:
            executor.close()
            raise
    return engine, executor


def _given(settings: ExecutorSettings) -> MemorySum | None:
    """A GPU's executor takes what it is given, or else nine tenths of what it finds."""
    if settings.memory_mib is None:
        return None
    part = MemoryPart(name="memory_mib, given to it", nbytes=settings.memory_mib * MIB)
    return MemorySum(parts=(part,))


def version_of(path: Path, *settings: object) -> str:
    """A digest of settings, and of the names, sizes and times of a folder's files."""
    digest = hashlib.sha256(repr((str(path), settings)).encode())
    for file in sorted(path.iterdir()):
        if file.is_file():
            found = file.stat()
            digest.update(repr((file.name, found.st_size, found.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]
