"""Calls that hand in texts and get numbers back: what embeddings and classification share.

Inputs are text or token ids, one or many. Who calls pays for the tokens that were read, and may
say until when it wants the answer; a client that leaves gives its places up.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidegate.api.admission import visit_of
from tidegate.api.answers import Json
from tidegate.api.backend import ModelCard, Route, Routed
from tidegate.api.body import read_json, unless_gone
from tidegate.api.door import ClientGoneError, request_id
from tidegate.api.field_table import Field, Ignored, Inner, Integer, Neutral, Raw, Table
from tidegate.api.fields import TOKEN_ID, Fields, kind_of, prose, token_ids, whole
from tidegate.api.long_json import long_json
from tidegate.api.metrics import CallRecord, Metrics
from tidegate.api.models import chosen_model
from tidegate.api.schema import MODEL
from tidegate.api.settings import HttpSettings
from tidegate.errors import CapacityError, DeadlineError, ExecutionError, RequestError

Text = str | tuple[int, ...]
"""One input: text, or the token ids of one with the special ones in place."""

MOST_INPUTS: Final = 2048
"""Inputs of one call, as OpenAI has it."""
_DAY_MS: Final = 86_400_000


class HasCard(Protocol):
    """A model that is listed."""

    @property
    def card(self) -> ModelCard:
        """Its entry of `/v1/models`; `context_tokens` is the longest text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextsCall:
    """What every such request has."""

    inputs: tuple[Text, ...] = field(repr=False)
    model: str | None
    timeout_s: float | None = None
    """After which the caller no longer wants the answer."""


_TEXT: Final = {"type": "string", "minLength": 1}
_TOKENS: Final = {
    "type": "array",
    "items": TOKEN_ID,
    "minItems": 1,
}
INPUT: Final = Raw(
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
_DEADLINE_MS: Final = Integer(
    name="deadline_ms", low=1, high=_DAY_MS, told="An answer that is later is of no use."
)
_OPTIONS: Final = Inner(
    name="tidegate",
    told="How soon it is needed.",
    table=Table(
        name="TidegateTextOptions",
        told="What is Tidegate's own in a call with texts.",
        fields=(_DEADLINE_MS,),
    ),
)
TEXT_FIELDS: Final[tuple[Field, ...]] = (
    INPUT,
    MODEL,
    _OPTIONS,
    Ignored(name="user", kind="string", told="Nothing is recorded of it."),
    Neutral(name="truncate_prompt_tokens", told="Texts that are too long are refused."),
    Neutral(name="add_special_tokens", values=(True,), told="Token ids may come without."),
)
"""What every such call has."""


def read_inputs(fields: Fields) -> tuple[Text, ...]:
    """The field `input`.

    Raises:
        RequestError: it is neither text nor token ids nor a list of either.
    """
    value = INPUT.read(fields)
    if isinstance(value, str):
        return (_text(value, "input"),)
    if not isinstance(value, list) or not value:
        found = "is absent" if value is None else f"is {kind_of(value)}"
        raise RequestError("input", f"{found}: must be text, token ids, or a list of either")
    if whole(value[0]) is not None:
        return (_tokens(value, "input"),)
    if len(value) > MOST_INPUTS:
        raise RequestError("input", f"{len(value)} inputs: must be at most {MOST_INPUTS}")
    return tuple(
        _tokens(one, f"input[{i}]") if isinstance(one, list) else _text(one, f"input[{i}]")
        for i, one in enumerate(value)
    )


def read_timeout_s(fields: Fields) -> float | None:
    """`tidegate.deadline_ms` in seconds."""
    inner = _OPTIONS.read(fields)
    wanted_ms = None if inner is None else _DEADLINE_MS.read(inner)
    return None if wanted_ms is None else wanted_ms / 1000


def _text(value: object, path: str) -> str:
    text = prose(value, path)
    if not text:
        raise RequestError(path, "is empty: must hold text")
    return text


def _tokens(value: list[object], path: str) -> tuple[int, ...]:
    if not value:
        raise RequestError(path, "is empty: must hold token ids")
    return token_ids(value, path)


def most_tokens(inputs: tuple[Text, ...], context_tokens: int) -> int:
    """More than these inputs cannot be: no token is less than a byte, and two mark the ends."""
    lengths = (len(one) if isinstance(one, tuple) else len(one.encode()) + 2 for one in inputs)
    return sum(min(length, context_tokens) for length in lengths)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """The tokens that were read, and what makes the answer object of them."""

    tokens: int
    body: Callable[[], Json]


Counted = Callable[[int], None]
"""Is told how many tokens a call has to read, before they are read."""


def uncounted(tokens: int) -> None:
    """Nobody pays."""


C = TypeVar("C", bound=TextsCall)
M = TypeVar("M", bound=HasCard)


class TextsEndpoint(ABC, Generic[C, M]):
    """An ASGI endpoint. Without a model it says so, rather than that there is no such path."""

    none_served: str
    """The 404 for every call when there is no model."""

    def __init__(
        self,
        models: Sequence[M],
        *,
        route: Route,
        settings: HttpSettings,
        metrics: Metrics,
        active: asyncio.BoundedSemaphore,
    ) -> None:
        self._models, self._route = models, route
        self._settings, self._metrics, self._active = settings, metrics, active

    @abstractmethod
    def read(self, data: object) -> C:
        """The call in a body; raises `RequestError`."""

    @abstractmethod
    def check(self, call: C, model: M) -> None:
        """Raise `RequestError` if `model` cannot serve `call`."""

    @abstractmethod
    async def answer(self, call: C, model: M, counted: Counted) -> Answered:
        """Ask `model`; `counted` is told the tokens."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if self._active.locked():
            limit = self._settings.max_calls
            error = CapacityError(f"{limit} calls are being answered already: try again later")
            self._metrics.begin().failed(error)
            raise error
        async with self._active:
            call = self.read(await read_json(scope, receive, self._settings))
            model = self._chosen(call.model, scope)
            self.check(call, model)
            record = self._metrics.begin()
            try:
                answered = await self._counted(call, model, record, scope, receive)
            finally:
                record.end()
        body = await long_json(answered.body)
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _counted(
        self, call: C, model: M, record: CallRecord, scope: Scope, receive: Receive
    ) -> Answered:
        """Ask, with the caller's key paying where keys do."""
        card, visit = model.card, visit_of(scope)
        routed = Routed(route=self._route, reason="", model=card.id, request_id=request_id(scope))
        counted: Counted = uncounted
        try:
            if visit is not None:
                await visit.admit_tokens(most_tokens(call.inputs, card.context_tokens), card.id)
                visit.tally.begin_reading()
                counted = visit.tally.counted
            answered = await unless_gone(receive, self.answer(call, model, counted))
        except ClientGoneError:
            record.see(routed)
            raise
        except Exception as error:
            if isinstance(error, DeadlineError | ExecutionError):
                record.see(routed)
            record.failed(error)
            if visit is not None:
                visit.tally.reading_failed(error)
            raise
        record.see(routed)
        record.read_only(answered.tokens)
        if visit is not None:
            visit.tally.read_only(answered.tokens)
        return answered

    def _chosen(self, name: str | None, scope: Scope) -> M:
        """The model that a call names, or the first that it may use."""
        if not self._models:
            raise RequestError("model", self.none_served, status=404)
        wanted = chosen_model(name, [model.card for model in self._models], scope)
        return next(model for model in self._models if model.card.id == wanted)
