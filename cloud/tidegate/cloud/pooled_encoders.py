"""Encoders of a pool as the HTTP surface asks them: known before they are loaded, loaded by a call.

A call holds its encoder until it is answered; what waiting for it took comes off its deadline.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Generic, TypeVar

from tidegate.api.backend import ModelCard
from tidegate.api.classify import Classified
from tidegate.api.embeddings import Embedded
from tidegate.api.encoder_metrics import EncoderMetrics
from tidegate.api.encoder_model import ClassifyingModel, EmbeddingModel, EncoderModel, longest_run_s
from tidegate.api.encoders import Encoders
from tidegate.api.texts import Counted, Text, uncounted
from tidegate.cloud.encoders import EncoderFacts, EncoderInMemory
from tidegate.cloud.pooled_model import Entry
from tidegate.cloud.served_models import Models, Served
from tidegate.errors import DeadlineError, UnavailableError

_Model = TypeVar("_Model", bound=EncoderModel)


class PooledEncoder(Generic[_Model]):
    """What both kinds share."""

    def __init__(self, pool: Models, name: str, kind: type[_Model], created_s: int) -> None:
        """Ask the encoder of that name, which `pool` has for as long as the service runs."""
        self._pool, self._name, self._kind = pool, name, kind
        self._created_s = created_s

    @property
    def card(self) -> ModelCard:
        """Its entry of `/v1/models`, with where it is now."""
        version = self._entry.current
        return ModelCard(
            id=self._name,
            created_s=self._created_s if version is None else version.loaded_s,
            context_tokens=self._entry.facts.context_tokens,
            state=self._entry.state,
        )

    @property
    def _entry(self) -> Entry[Served]:
        return self._pool.entries[self._name]

    @property
    def _facts(self) -> EncoderFacts:
        facts = self._entry.facts.encoder
        assert facts is not None, "its maker describes encoders"
        return facts

    @asynccontextmanager
    async def _held(self, timeout_s: float | None) -> AsyncIterator[tuple[_Model, float | None]]:
        """The encoder in memory, and how long the call may still take.

        Raises:
            CapacityError: there is no room, or too many wait for it.
            DeadlineError: it was not loaded in time.
            UnavailableError: it could not be loaded, or the service stops.
        """
        began_s = time.monotonic()
        deadline_ms = None if timeout_s is None else max(1, round(timeout_s * 1000))

        def left_s() -> float | None:
            return None if timeout_s is None else timeout_s - (time.monotonic() - began_s)

        async with AsyncExitStack() as stack:
            try:
                use = self._pool.use(self._name, deadline_ms=deadline_ms)
                used = await stack.enter_async_context(use)
            except UnavailableError as error:
                left = left_s()
                if left is None or left > 0:
                    raise
                raise DeadlineError(f"{self._name}: not loaded within {timeout_s:g} s") from error
            assert isinstance(used.model, EncoderInMemory), "its maker loads encoders"
            assert isinstance(used.model.model, self._kind), "its maker checks of which kind"
            yield used.model.model, left_s()


class PooledEmbedder(PooledEncoder[EmbeddingModel]):
    """`tidegate.api.embeddings.Embedder`."""

    @property
    def dimensions(self) -> int:
        """See `Embedder.dimensions`."""
        return self._facts.arch.outputs

    @property
    def smaller_dimensions(self) -> Collection[int]:
        """See `Embedder.smaller_dimensions`."""
        return self._facts.use.smaller_dimensions

    async def embed(
        self,
        inputs: tuple[Text, ...],
        *,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        counted: Counted = uncounted,
    ) -> Embedded:
        """See `Embedder.embed`; raises what loading it may, too."""
        async with self._held(timeout_s) as (model, left_s):
            return await model.embed(
                inputs, dimensions=dimensions, timeout_s=left_s, counted=counted
            )


class PooledClassifier(PooledEncoder[ClassifyingModel]):
    """`tidegate.api.classify.Classifier`."""

    @property
    def labels(self) -> Sequence[str]:
        """See `Classifier.labels`."""
        return self._facts.arch.labels

    async def classify(
        self,
        inputs: tuple[Text, ...],
        *,
        timeout_s: float | None = None,
        counted: Counted = uncounted,
    ) -> Classified:
        """See `Classifier.classify`; raises what loading it may, too."""
        async with self._held(timeout_s) as (model, left_s):
            return await model.classify(inputs, timeout_s=left_s, counted=counted)


def encoders_of(pool: Models, metrics: EncoderMetrics, *, created_s: int) -> Encoders:
    """The encoders that `pool` serves, which is started; it keeps them as long as it is open.

    Args:
        pool: has them among its models.
        metrics: that its maker gives to each.
        created_s: told of those that are not in memory.
    """
    kinds = {name: entry.settings.kind for name, entry in pool.entries.items()}

    def busy_s() -> float:
        models = (version.model for version in pool.versions())
        return longest_run_s([one.model for one in models if isinstance(one, EncoderInMemory)])

    return Encoders(
        embedders=[
            PooledEmbedder(pool, name, EmbeddingModel, created_s)
            for name, kind in kinds.items()
            if kind == "vectors"
        ],
        classifiers=[
            PooledClassifier(pool, name, ClassifyingModel, created_s)
            for name, kind in kinds.items()
            if kind == "labels"
        ],
        route="cloud",
        metrics=metrics,
        busy_s=busy_s,
    )
