"""`BundleEmbedder`: an encoder bundle as an `Embedder`, with calls that come together batched.

One thread runs the encoder. While it runs, what arrives waits in line, and the next run takes all
of it, so a batch grows with the load and nobody waits for a timer. The line is bounded in texts.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from tidegate.api.backend import ModelCard
from tidegate.api.embeddings import Embedded, Text
from tidegate.edge.executors.encoder import EncoderExecutor, EncoderSettings, open_encoder
from tidegate.errors import (
    BundleError,
    CapacityError,
    ExecutionError,
    RequestError,
    TidegateError,
    UnavailableError,
    describe_defect,
)
from tidegate.model.bundle import Bundle
from tidegate.model.packed import Array

_log = logging.getLogger(__name__)

MOST_WAITING = 4096
"""Texts in line: two calls of the most that one may hold."""
_CHARS_PER_TOKEN = 16
"""As `tidegate.engine.text` has it: a text with more can not fit and is refused unread."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Job:
    """One call in line: token ids of its texts, and where the vectors go."""

    texts: list[list[int]] = field(repr=False)
    done: asyncio.Future[Array]


class BundleEmbedder:
    """See the module. `close` when no call is in flight."""

    def __init__(
        self, encoder: EncoderExecutor, tokenizer: Tokenizer, *, model_id: str, created_s: int
    ) -> None:
        """Serve `encoder`, which is this object's from now on.

        Raises:
            BundleError: the encoder is a classifier: its outputs are no embedding.
        """
        if encoder.arch.labels:
            raise BundleError(f"{model_id}: is a classifier: it makes labels and no embeddings")
        # What training cut or filled up to one length is a whole text here.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._encoder, self._tokenizer = encoder, tokenizer
        self._card = ModelCard(
            id=model_id, created_s=created_s, context_tokens=encoder.context_tokens
        )
        self._line: deque[_Job] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tidegate-embed")
        self._running: asyncio.Task[None] | None = None
        self._in_flight: list[_Job] = []
        self._closed = False

    @property
    def card(self) -> ModelCard:
        """See `Embedder.card`."""
        return self._card

    @property
    def dimensions(self) -> int:
        """See `Embedder.dimensions`."""
        return self._encoder.arch.outputs

    async def embed(self, inputs: tuple[Text, ...]) -> Embedded:
        """See `Embedder.embed`."""
        self._check_room(len(inputs))
        # The tokenizer lets go of the interpreter, so a thread of its own keeps the loop free.
        texts = await asyncio.to_thread(self._encoded, inputs)
        self._check_room(len(inputs))  # others may have come meanwhile
        job = _Job(texts=texts, done=asyncio.get_running_loop().create_future())
        self._line.append(job)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._serve())
        vectors = await job.done
        return Embedded(vectors=vectors, tokens=sum(map(len, texts)))

    def close(self) -> None:
        """Let go of the model; calls still here fail, to be asked again."""
        self._closed = True
        for job in (*self._in_flight, *self._line):
            if not job.done.done():
                job.done.set_exception(UnavailableError("the embedding model is shutting down"))
        self._line.clear()
        self._thread.shutdown(wait=True)
        self._encoder.close()

    def _check_room(self, texts: int) -> None:
        if self._closed:
            raise UnavailableError("the embedding model is shutting down")
        waiting = texts + sum(len(job.texts) for job in self._line)
        if waiting > MOST_WAITING:
            raise CapacityError(f"{waiting} texts would be waiting: at most {MOST_WAITING} may")

    def _encoded(self, inputs: tuple[Text, ...]) -> list[list[int]]:
        most = self._encoder.context_tokens
        texts = []
        for number, one in enumerate(inputs):
            if isinstance(one, str) and len(one) > _CHARS_PER_TOKEN * most:
                problem = f"{len(one)} characters: must be at most {_CHARS_PER_TOKEN * most}"
                raise RequestError(f"input[{number}]", problem, status=413)
            texts.append(self._tokenizer.encode(one).ids if isinstance(one, str) else list(one))
        self._encoder.check(texts)
        return texts

    async def _serve(self) -> None:
        """Run until the line is empty, everything that waits at a time."""
        loop = asyncio.get_running_loop()
        while self._line:
            jobs = self._in_flight = [job for job in self._line if not job.done.done()]
            self._line.clear()
            texts = [text for job in jobs for text in job.texts]
            result = await loop.run_in_executor(self._thread, self._run, texts)
            start = 0
            for job in jobs:
                end = start + len(job.texts)
                if job.done.done():  # its caller went away
                    pass
                elif isinstance(result, TidegateError):
                    job.done.set_exception(result)
                else:
                    job.done.set_result(result[start:end])
                start = end
        self._in_flight = []

    def _run(self, texts: Sequence[Sequence[int]]) -> Array | TidegateError:
        try:
            return self._encoder.encode(texts)
        except TidegateError as error:
            return error
        except Exception as error:  # the boundary to the runtime's library
            _log.error("embedding failed: %s", describe_defect(error))
            return ExecutionError(f"embedding failed: {type(error).__name__}")


def open_embedder(
    folder: Path,
    settings: EncoderSettings,
    *,
    created_s: int,
    trusted: frozenset[str] | None = None,
) -> BundleEmbedder:
    """Verify and load an encoder bundle, signed by one of `trusted` unless that is None.

    Raises:
        BundleError: it is damaged, is no encoder's, or makes labels and no embeddings.
        ConfigError: a setting is out of range.
    """
    bundle = Bundle.open(folder, trusted=trusted, every_target=False)
    encoder = open_encoder(bundle, settings)
    try:
        tokenizer = Tokenizer.from_file(str(bundle.folder / "tokenizer.json"))
        return BundleEmbedder(
            encoder, tokenizer, model_id=bundle.manifest.model_id, created_s=created_s
        )
    except TidegateError:
        encoder.close()
        raise
    except Exception as error:  # the library raises nothing narrower
        encoder.close()
        raise BundleError(f"tokenizer.json: not a tokenizer: {error}") from error
