"""`EmbeddingModel` and `ClassifyingModel`: an encoder with its tokenizer, batched by load.

What runs it is a `TextEncoder`: a bundle's graph on the device, torch in the cloud. Texts are
tokenised and checked before they wait, so one that cannot be run is refused alone and by name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from tokenizers import Tokenizer

from tidegate.api.backend import ModelCard
from tidegate.api.classify import Classified
from tidegate.api.embeddings import Embedded
from tidegate.api.encoder_metrics import EncoderMetrics
from tidegate.api.texts import Counted, Text, uncounted
from tidegate.engine.text_batcher import CLOSE_S, TextBatcher
from tidegate.engine.text_batches import BatchLimits, check_texts
from tidegate.errors import BundleError, RequestError, TidegateError
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.encoder_use import EncoderUse, Scoring
from tidegate.model.packed import Array

_log = logging.getLogger(__name__)

_CHARS_PER_TOKEN: Final = 16
"""As `tidegate.engine.text` has it: a text with more can not fit and is refused unread."""
_CHARS_IN_LOOP: Final = 2048
"""So much is tokenised in the event loop, in less than a millisecond; others go to a thread."""


class TextEncoder(Protocol):
    """Runs a model over token ids. For one thread at a time."""

    @property
    def arch(self) -> EncoderArchitecture:
        """The model."""

    @property
    def context_tokens(self) -> int:
        """Tokens of the longest text."""

    def encode(self, texts: Sequence[Sequence[int]]) -> Array:
        """Embeddings or logits [texts, outputs], in the order of the texts, which were checked.

        Raises:
            ExecutionError: the model failed.
        """

    def close(self) -> None:
        """Let go of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedAs:
    """What a model is called, and how its texts are batched."""

    model_id: str
    created_s: int
    limits: BatchLimits
    metrics: EncoderMetrics | None = None


class EncoderModel:
    """What both kinds share. `close` when no call is in flight."""

    def __init__(
        self, encoder: TextEncoder, tokenizer: Tokenizer, use: EncoderUse, served: ServedAs
    ) -> None:
        """Serve `encoder` and `tokenizer`, which are this object's from now on."""
        # What training cut or filled up to one length is a whole text here.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._encoder, self._tokenizer, self._use = encoder, tokenizer, use
        self._card = ModelCard(
            id=served.model_id, created_s=served.created_s, context_tokens=encoder.context_tokens
        )
        self._metrics = served.metrics
        self.batcher = TextBatcher(encoder.encode, served.limits, name=served.model_id)
        if served.metrics is not None:
            self.batcher.saw = partial(served.metrics.saw, served.model_id)
            served.metrics.watch(served.model_id, self._waiting)

    @property
    def card(self) -> ModelCard:
        """Its entry of `/v1/models`."""
        return self._card

    def _waiting(self) -> int:
        return self.batcher.waiting

    async def outputs(
        self,
        inputs: tuple[Text, ...],
        timeout_s: float | None = None,
        counted: Counted = uncounted,
    ) -> tuple[Array, int]:
        """The encoder's outputs [inputs, ...] and the tokens that were read, told to `counted`.

        Raises:
            RequestError: an input is too long or has an unknown token; names which.
            CapacityError: too many texts are waiting.
            DeadlineError: they were not there within `timeout_s`.
            ExecutionError: the model failed.
            UnavailableError: it is being closed.
        """
        self.batcher.check_room(len(inputs))
        if sum(len(one) for one in inputs) <= _CHARS_IN_LOOP:
            texts = self._encoded(inputs)
        else:
            # The tokenizer lets go of the interpreter, so a thread of its own keeps the loop free.
            texts = await asyncio.to_thread(self._encoded, inputs)
        tokens = sum(map(len, texts))
        counted(tokens)
        return await self.batcher.outputs(texts, timeout_s=timeout_s), tokens

    def close(self, *, timeout_s: float = CLOSE_S) -> None:
        """Let go of the model; calls still here fail, to be asked again.

        One whose run takes longer than `timeout_s` keeps it: a thread uses it.
        """
        if self.batcher.close(timeout_s=timeout_s):
            self._encoder.close()
        else:
            _log.error("%s: a run did not end: its model is not let go of", self._card.id)
        if self._metrics is not None:
            self._metrics.forget(self._card.id, self._waiting)

    def _encoded(self, inputs: tuple[Text, ...]) -> list[Sequence[int]]:
        most = self._encoder.context_tokens
        texts: list[Sequence[int]] = []
        for number, one in enumerate(inputs):
            if isinstance(one, str) and len(one) > _CHARS_PER_TOKEN * most:
                problem = f"{len(one)} characters: must be at most {_CHARS_PER_TOKEN * most}"
                raise RequestError(f"input[{number}]", problem, status=413)
            texts.append(self._tokenizer.encode(one).ids if isinstance(one, str) else one)
        check_texts(texts, context_tokens=most, vocab=self._encoder.arch.vocab)
        return texts


class EmbeddingModel(EncoderModel):
    """`tidegate.api.embeddings.Embedder`."""

    @property
    def dimensions(self) -> int:
        """See `Embedder.dimensions`."""
        return self._encoder.arch.outputs

    @property
    def smaller_dimensions(self) -> Collection[int]:
        """See `Embedder.smaller_dimensions`."""
        return self._use.smaller_dimensions

    async def embed(
        self,
        inputs: tuple[Text, ...],
        *,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        counted: Counted = uncounted,
    ) -> Embedded:
        """See `Embedder.embed`."""
        vectors, tokens = await self.outputs(inputs, timeout_s, counted)
        if dimensions is not None and dimensions < self.dimensions:
            vectors = cut(vectors, dimensions, unit=self._encoder.arch.normalised)
        return Embedded(vectors=vectors, tokens=tokens)


class ClassifyingModel(EncoderModel):
    """`tidegate.api.classify.Classifier`."""

    @property
    def labels(self) -> Sequence[str]:
        """See `Classifier.labels`."""
        return self._encoder.arch.labels

    async def classify(
        self,
        inputs: tuple[Text, ...],
        *,
        timeout_s: float | None = None,
        counted: Counted = uncounted,
    ) -> Classified:
        """See `Classifier.classify`."""
        logits, tokens = await self.outputs(inputs, timeout_s, counted)
        return Classified(probs=scored(logits, self._use.scoring), tokens=tokens)


def cut(vectors: Array, dimensions: int, *, unit: bool) -> Array:
    """The first values of vectors [texts, D]; with `unit`, at length 1 again."""
    found = vectors[:, :dimensions]
    if not unit:
        return found
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    scaled: Array = found / np.maximum(lengths, np.finfo(np.float32).tiny)
    return scaled


def scored(logits: Array, scoring: Scoring) -> Array:
    """Probabilities of logits [texts, labels]; the logits themselves where they are no such."""
    if scoring == "none":
        return logits
    wide = logits.astype(np.float64)
    if scoring == "sigmoid":
        found = 1 / (1 + np.exp(-np.clip(wide, -700, 700)))
    else:
        powers = np.exp(wide - wide.max(axis=1, keepdims=True))
        found = powers / powers.sum(axis=1, keepdims=True)
    probs: Array = found.astype(np.float32)
    return probs


def longest_run_s(models: Sequence[EncoderModel]) -> float:
    """See `Encoders.busy_s`."""
    return max((model.batcher.busy_s for model in models), default=0.0)


def check_kind(
    name: str,
    arch: EncoderArchitecture,
    kind: type[EncoderModel],
    refuse: Callable[[str], TidegateError],
) -> None:
    """Refuse a classifier where an embedder is wanted, and the other way round."""
    if arch.labels and kind is EmbeddingModel:
        raise refuse(f"{name}: is a classifier: it makes labels and no embeddings")
    if not arch.labels and kind is ClassifyingModel:
        raise refuse(f"{name}: is no classifier: it makes embeddings and no labels")


def open_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        BundleError: it is none.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise BundleError(f"{path.name}: not a tokenizer: {error}") from error
