"""`/v1/embeddings`: texts or token ids in, vectors out, in OpenAI's shapes.

What computes them stands behind `Embedder`. Vectors come as JSON numbers, or in base64 as
little-endian float32, which the openai client asks for unless told otherwise.
"""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidegate.api.admission import visit_of
from tidegate.api.answers import Json
from tidegate.api.backend import ModelCard
from tidegate.api.body import read_json, unless_gone
from tidegate.api.field_table import Choice, Ignored, Integer, Raw, Table
from tidegate.api.fields import kind_of, prose
from tidegate.api.long_json import long_json
from tidegate.api.schema import MODEL
from tidegate.api.settings import HttpSettings
from tidegate.errors import CapacityError, RequestError

Text = str | tuple[int, ...]
"""One input: text, or the token ids of one with the special ones in place."""

MOST_INPUTS: Final = 2048
"""Inputs of one call, as OpenAI has it."""
_TOKEN_IDS: Final = 2**31 - 1
_DIMENSIONS: Final = 1 << 16

_TEXT: Final = {"type": "string", "minLength": 1}
_TOKENS: Final = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": _TOKEN_IDS},
    "minItems": 1,
}
_INPUT = Raw(
    name="input",
    required=True,
    schema_={
        "anyOf": [
            _TEXT,
            _TOKENS,
            {
                "type": "array",
                "items": {"anyOf": [_TEXT, _TOKENS]},
                "minItems": 1,
                "maxItems": MOST_INPUTS,
            },
        ]
    },
    told="Text or token ids; or a list of either.",
)
_ENCODING = Choice(
    name="encoding_format",
    allowed=("float", "base64"),
    told="base64 is little-endian float32; numbers if absent.",
)
_SIZE = Integer(
    name="dimensions", low=1, high=_DIMENSIONS, told="Only the model's own; it cannot be cut."
)
EMBEDDING = Table(
    name="EmbeddingCall",
    told="Texts that become vectors.",
    fields=(
        _INPUT,
        MODEL,
        _ENCODING,
        _SIZE,
        Ignored(name="user", kind="string", told="Nothing is recorded of it."),
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingCall:
    """One validated request."""

    inputs: tuple[Text, ...] = field(repr=False)
    model: str | None
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

    async def embed(self, inputs: tuple[Text, ...]) -> Embedded:
        """The vectors of `inputs`.

        Raises:
            RequestError: an input is empty, too long or has an unknown token; names which.
            CapacityError: too many texts are waiting.
        """


def read_embedding(data: object) -> EmbeddingCall:
    """The body of `/v1/embeddings`, as parsed JSON.

    Raises:
        RequestError: a field is wrong.
    """
    fields = EMBEDDING.open(data)
    return EmbeddingCall(
        inputs=_inputs(_INPUT.read(fields)),
        model=MODEL.read(fields),
        encoding=cast(Literal["float", "base64"], _ENCODING.read(fields) or "float"),
        dimensions=_SIZE.read(fields),
    )


def _inputs(value: object) -> tuple[Text, ...]:
    if isinstance(value, str):
        return (_text(value, "input"),)
    if not isinstance(value, list) or not value:
        found = "is absent" if value is None else f"is {kind_of(value)}"
        raise RequestError("input", f"{found}: must be text, token ids, or a list of either")
    if type(value[0]) is int:
        return (_tokens(value, "input"),)
    if len(value) > MOST_INPUTS:
        raise RequestError("input", f"{len(value)} inputs: must be at most {MOST_INPUTS}")
    return tuple(
        _tokens(one, f"input[{i}]") if isinstance(one, list) else _text(one, f"input[{i}]")
        for i, one in enumerate(value)
    )


def _text(value: object, path: str) -> str:
    text = prose(value, path)
    if not text:
        raise RequestError(path, "is empty: must hold text")
    return text


def _tokens(value: list[object], path: str) -> tuple[int, ...]:
    tokens = [token for token in value if type(token) is int and 0 <= token <= _TOKEN_IDS]
    if not tokens or len(tokens) < len(value):
        raise RequestError(path, f"must hold token ids from 0 to {_TOKEN_IDS}, at least one")
    return tuple(tokens)


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


def most_tokens(inputs: tuple[Text, ...], context_tokens: int) -> int:
    """More than these inputs cannot be: no token is less than a byte, and two mark the ends."""
    lengths = (len(one) if isinstance(one, tuple) else len(one.encode()) + 2 for one in inputs)
    return sum(min(length, context_tokens) for length in lengths)


class EmbeddingEndpoint:
    """An ASGI endpoint. Without an embedder it says so, rather than that there is no such path."""

    def __init__(
        self,
        embedder: Embedder | None,
        *,
        settings: HttpSettings,
        active: asyncio.BoundedSemaphore,
    ) -> None:
        self._embedder, self._settings, self._active = embedder, settings, active

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if self._active.locked():
            limit = self._settings.max_calls
            raise CapacityError(f"{limit} calls are being answered already: try again later")
        async with self._active:
            call = read_embedding(await read_json(scope, receive, self._settings))
            embedder = self._checked(call)
            visit = visit_of(scope)
            if visit is not None:
                await visit.admit_tokens(
                    most_tokens(call.inputs, embedder.card.context_tokens), embedder.card.id
                )
            embedded = await unless_gone(receive, embedder.embed(call.inputs))
            if visit is not None:
                visit.tally.read_only(embedded.tokens)
        body = await long_json(partial(embeddings_object, call, embedded, embedder.card.id))
        await Response(body, media_type="application/json")(scope, receive, send)

    def _checked(self, call: EmbeddingCall) -> Embedder:
        embedder = self._embedder
        if embedder is None:
            raise RequestError(
                "model", "no embedding model is served: give one with --embedder", status=404
            )
        if call.model not in (None, embedder.card.id):
            raise RequestError("model", f"must be {embedder.card.id!r}", status=404)
        if call.dimensions not in (None, embedder.dimensions):
            problem = f"{call.dimensions}: must be {embedder.dimensions}, or absent"
            raise RequestError("dimensions", problem)
        return embedder
