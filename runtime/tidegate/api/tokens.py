"""`/tokenize` and `/detokenize`: what a model's tokens are, in vLLM's shapes, without running it.

Texts of any length that the model's text side takes are told, also those beyond the context: their
length is what callers want to know. Long ones are worked on in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from starlette.routing import BaseRoute, Route
from starlette.types import Scope

from tidegate.api.answers import Json
from tidegate.api.backend import Backend, ModelCard
from tidegate.api.field_table import Flag, Raw, Table
from tidegate.api.fields import TOKEN_ID, Fields, kind_of, prose, token_ids
from tidegate.api.long_json import long_json
from tidegate.api.messages import MESSAGES, Message, read_messages
from tidegate.api.models import chosen_model
from tidegate.api.reading import ReadingEndpoint, begin_reading
from tidegate.api.schema import MODEL
from tidegate.api.settings import HttpSettings
from tidegate.api.tools import TOOL_LIST, Tools, read_tool_list
from tidegate.api.tools_prompt import encode_with_tools
from tidegate.engine.text import TextModel
from tidegate.errors import RequestError

TextOf = Callable[[str], Awaitable[TextModel]]
"""The text side of a model that the backend lists."""

MOST_TOKENS: Final = 262_144
"""Of one `/detokenize`: about what a body of 2 MiB holds, and half a second of a thread."""

_PROMPT = Raw(name="prompt", schema_={"type": "string"}, told="A raw text. Or else messages.")
_SPECIAL = Flag(
    name="add_special_tokens",
    told="Of a prompt: with the tokens that the tokenizer adds; true if absent. A chat's template"
    " has its own: only false, or absent.",
)
_READY = Flag(
    name="add_generation_prompt",
    told="Of a chat: with the beginning of the assistant's answer; true if absent.",
)
_STRINGS = Flag(
    name="return_token_strs", told="Tell how the vocabulary spells each token; false if absent."
)
_TOKENS = Raw(
    name="tokens",
    required=True,
    schema_={
        "type": "array",
        "items": TOKEN_ID,
        "maxItems": MOST_TOKENS,
    },
    told="Token ids, special ones among them.",
)
TOKENIZE = Table(
    name="TokenizeCall",
    told="A raw text or a chat, of which the tokens are told.",
    fields=(MODEL, _PROMPT, MESSAGES.optional(), TOOL_LIST, _SPECIAL, _READY, _STRINGS),
    rule={
        "anyOf": [
            {
                "required": ["prompt"],
                "properties": {
                    "prompt": {"type": "string"},
                    "messages": {"type": "null"},
                    "tools": {"enum": [None, []]},
                    "add_generation_prompt": {"type": "null"},
                },
            },
            {
                "required": ["messages"],
                "properties": {
                    "messages": {"type": "array"},
                    "prompt": {"type": "null"},
                    "add_special_tokens": {"enum": [False, None]},
                },
            },
        ]
    },
)
DETOKENIZE = Table(
    name="DetokenizeCall", told="Tokens, of which the text is told.", fields=(MODEL, _TOKENS)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeCall:
    """One validated request. Exactly one of `messages` and `prompt` is set."""

    model: str | None
    prompt: str | None = field(default=None, repr=False)
    messages: tuple[Message, ...] = field(default=(), repr=False)
    tools: Tools | None = None
    special: bool = True
    ready: bool = True
    strings: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DetokenizeCall:
    """One validated request."""

    model: str | None
    tokens: tuple[int, ...] = field(repr=False)


def read_tokenize(data: object) -> TokenizeCall:
    """The body of `/tokenize`, as parsed JSON.

    Raises:
        RequestError: a field is wrong.
    """
    fields = TOKENIZE.open(data)
    prompt, messages = _PROMPT.read(fields), MESSAGES.read(fields)
    if (prompt is None) is (messages is None):
        found = "is absent, and so are messages" if prompt is None else "is there, and messages too"
        raise RequestError("prompt", f"{found}: must be one of them")
    tools, special, ready = read_tool_list(fields), _SPECIAL.read(fields), _READY.read(fields)
    if prompt is not None:
        _only_chats(fields, tools=tools or None, ready=ready)
    elif special:
        problem = "true: must be false or absent in a chat, whose template has its own"
        raise RequestError(_SPECIAL.name, problem)
    return TokenizeCall(
        model=MODEL.read(fields),
        prompt=None if prompt is None else prose(prompt, "prompt"),
        messages=() if messages is None else read_messages(messages),
        tools=Tools(tools=tools) if tools else None,
        special=special is not False,
        ready=ready is not False,
        strings=_STRINGS.read(fields) or False,
    )


def _only_chats(fields: Fields, *, tools: object, ready: object) -> None:
    for name, value in ((TOOL_LIST.name, tools), (_READY.name, ready)):
        if value is not None:
            problem = "is there: must come with messages, or be absent"
            raise RequestError(fields.path(name), problem)


def read_detokenize(data: object) -> DetokenizeCall:
    """The body of `/detokenize`, as parsed JSON.

    Raises:
        RequestError: a field is wrong.
    """
    fields = DETOKENIZE.open(data)
    tokens = _TOKENS.read(fields)
    if not isinstance(tokens, list):
        found = "is absent" if tokens is None else f"is {kind_of(tokens)}"
        raise RequestError("tokens", f"{found}: must be a list of token ids")
    if len(tokens) > MOST_TOKENS:
        problem = f"holds {len(tokens)}: must be at most {MOST_TOKENS}"
        raise RequestError("tokens", problem, status=413)
    return DetokenizeCall(model=MODEL.read(fields), tokens=token_ids(tokens, "tokens"))


def tokenized(call: TokenizeCall, text: TextModel, card: ModelCard) -> Json:
    """The answer object.

    Raises:
        RequestError: the text is longer than what `text` takes (413), or its template refuses it.
    """
    if call.prompt is None:
        tokens = encode_with_tools(call.messages, call.tools, text, limited=False, ready=call.ready)
    else:
        tokens = text.tokens_of(call.prompt, special=call.special)
    return {
        "count": len(tokens),
        "max_model_len": card.context_tokens,
        "tokens": list(tokens),
        "token_strs": text.names_of(tokens) if call.strings else None,
    }


def detokenized(call: DetokenizeCall, text: TextModel) -> Json:
    """The answer object.

    Raises:
        RequestError: the model has no such token.
    """
    return {"prompt": text.spell(call.tokens)}


class _TokensEndpoint(ReadingEndpoint):
    """What both endpoints have in common: the model, the key."""

    def __init__(
        self,
        backend: Backend,
        texts: TextOf | None,
        *,
        settings: HttpSettings,
        active: asyncio.BoundedSemaphore,
    ) -> None:
        super().__init__(settings=settings, active=active)
        self._backend, self._texts = backend, texts

    async def _model(self, model: str | None, scope: Scope) -> tuple[TextModel, ModelCard]:
        """The model that was named; the caller's key pays for one request and no tokens."""
        cards = self._backend.models()
        if self._texts is None or not cards:
            raise RequestError("model", "no model with a tokenizer is served here", status=404)
        wanted = chosen_model(model, cards, scope)
        card = next(one for one in cards if one.id == wanted)
        await begin_reading(scope, card.id)
        return await self._texts(card.id), card


class TokenizeEndpoint(_TokensEndpoint):
    """An ASGI endpoint."""

    async def _answer(self, data: object, scope: Scope) -> bytes:
        call = read_tokenize(data)
        text, card = await self._model(call.model, scope)
        return await long_json(lambda: tokenized(call, text, card))


class DetokenizeEndpoint(_TokensEndpoint):
    """An ASGI endpoint."""

    async def _answer(self, data: object, scope: Scope) -> bytes:
        call = read_detokenize(data)
        text, _ = await self._model(call.model, scope)
        return await long_json(lambda: detokenized(call, text))


def token_routes(
    backend: Backend,
    texts: TextOf | None,
    *,
    settings: HttpSettings,
    active: asyncio.BoundedSemaphore,
) -> list[BaseRoute]:
    """Both calls, under vLLM's paths and beside OpenAI's."""
    made = {
        "/tokenize": TokenizeEndpoint(backend, texts, settings=settings, active=active),
        "/detokenize": DetokenizeEndpoint(backend, texts, settings=settings, active=active),
    }
    return [
        Route(f"{root}{path}", endpoint, methods=["POST"])
        for root in ("", "/v1")
        for path, endpoint in made.items()
    ]
