"""`/v1/embeddings`: texts or token ids in, vectors out, in OpenAI's shapes.

What computes them stands behind `Embedder`. Vectors come as JSON numbers, or in base64 as
little-endian float32, which the openai client asks for unless told otherwise.
"""

from __future__ import annotations

import base64
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from tidegate.api.answers import Json
from tidegate.api.backend import ModelCard
from tidegate.api.field_table import Choice, Integer, Table
from tidegate.api.schema import MODEL
from tidegate.api.texts import (
    MOST_INPUTS,
    TEXT_FIELDS,
    Answered,
    Counted,
    Text,
    TextsCall,
    TextsEndpoint,
    most_tokens,
    read_inputs,
    read_timeout_s,
    uncounted,
)
from tidegate.errors import RequestError

__all__ = ["MOST_INPUTS", "Embedded", "Embedder", "Text", "most_tokens", "read_embedding"]

_DIMENSIONS: Final = 1 << 16

_ENCODING = Choice(
    name="encoding_format",
    allowed=("float", "base64"),
    told="base64 is little-endian float32; numbers if absent.",
)
_SIZE = Integer(
    name="dimensions",
    low=1,
    high=_DIMENSIONS,
    told="The model's own, or a smaller one that it was trained for.",
)
EMBEDDING = Table(
    name="EmbeddingCall",
    told="Texts that become vectors.",
    fields=(*TEXT_FIELDS, _ENCODING, _SIZE),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingCall(TextsCall):
    """One validated request."""

    encoding: Literal["float", "base64"] = "float"
    dimensions: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Embedded:
    """Vectors float32 [inputs, D], in the order of the inputs, and how many tokens were read."""

    vectors: npt.NDArray[np.float32]
    tokens: int


class Embedder(Protocol):
    """Turns texts into vectors. Used concurrently from one event loop."""

    @property
    def card(self) -> ModelCard:
        """Its entry of `/v1/models`; `context_tokens` is the longest text."""

    @property
    def dimensions(self) -> int:
        """D, the length of its vectors."""

    @property
    def smaller_dimensions(self) -> Collection[int]:
        """Lengths that its vectors may be cut to; none for a model that was not made for it."""

    async def embed(
        self,
        inputs: tuple[Text, ...],
        *,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        counted: Counted = uncounted,
    ) -> Embedded:
        """The vectors of `inputs`.

        Args:
            inputs: at least one.
            dimensions: D or one of the smaller ones.
            timeout_s: after which the caller no longer wants them.
            counted: is told how many tokens `inputs` are, before they are read.

        Raises:
            RequestError: an input is empty, too long or has an unknown token; names which.
            CapacityError: too many texts are waiting.
            DeadlineError: they were not there in time.
        """


def read_embedding(data: object) -> EmbeddingCall:
    """The body of `/v1/embeddings`, as parsed JSON.

    Raises:
        RequestError: a field is wrong.
    """
    fields = EMBEDDING.open(data)
    return EmbeddingCall(
        inputs=read_inputs(fields),
        model=MODEL.read(fields),
        timeout_s=read_timeout_s(fields),
        encoding=cast(Literal["float", "base64"], _ENCODING.read(fields) or "float"),
        dimensions=_SIZE.read(fields),
    )


def embeddings_object(call: EmbeddingCall, embedded: Embedded, model: str) -> Json:
    """OpenAI's answer object."""
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _encoded(call, vector)}
            for i, vector in enumerate(embedded.vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens},
    }


def _encoded(call: EmbeddingCall, vector: npt.NDArray[np.float32]) -> object:
    if call.encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


class EmbeddingEndpoint(TextsEndpoint[EmbeddingCall, Embedder]):
    """See `TextsEndpoint`."""

    none_served = "no embedding model is served: give one with --embedder"

    def read(self, data: object) -> EmbeddingCall:
        """See `TextsEndpoint.read`."""
        return read_embedding(data)

    def check(self, call: EmbeddingCall, model: Embedder) -> None:
        """Only lengths that the model was made for."""
        wanted, smaller = call.dimensions, model.smaller_dimensions
        if wanted in (None, model.dimensions) or wanted in smaller:
            return
        allowed = f"must be {model.dimensions}, or absent"
        if isinstance(smaller, range):
            allowed = f"must be from {smaller[0]} to {model.dimensions}"
        elif smaller:
            allowed = f"must be {', '.join(map(str, smaller))} or {model.dimensions}"
        raise RequestError("dimensions", f"{wanted}: {allowed}")

    async def answer(self, call: EmbeddingCall, model: Embedder, counted: Counted) -> Answered:
        """See `TextsEndpoint.answer`."""
        embedded = await model.embed(
            call.inputs,
            dimensions=call.dimensions,
            timeout_s=call.timeout_s,
            counted=counted,
        )
        body = partial(embeddings_object, call, embedded, model.card.id)
        return Answered(tokens=embedded.tokens, body=body)
