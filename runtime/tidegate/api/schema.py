"""Requests of the OpenAI-compatible API, read from JSON and validated field by field.

A `Call` keeps what the engine needs in its own types; every wrong field is one `RequestError` that
names it, what it was and what is allowed. So is a field that nobody knows. The tables `CHAT` and
`COMPLETION` hold all fields; those that change nothing here, or may not, are in `schema_others`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, cast, get_args

from tidegate.api.field_table import Choice, Field, Flag, Inner, Integer, Name, Neutral, Raw, Table
from tidegate.api.fields import TOKEN_ID, Fields, kind_of, prose, shown, token_ids, whole
from tidegate.api.messages import MESSAGES, message_json, read_messages
from tidegate.api.messages import Message as Message
from tidegate.api.messages import Role as Role
from tidegate.api.schema_others import CHAT_OTHERS, COMPLETION_OTHERS, ONLY_CHATS, ONLY_COMPLETIONS
from tidegate.api.schema_sampling import (
    REST_OF_CONTEXT,
    SAMPLING_FIELDS,
    Kind,
    read_max_tokens,
    read_sampling,
    sampling_json,
)
from tidegate.api.structured import CONSTRAINT_FIELDS, constraint_json, read_constraint
from tidegate.api.tools import TOOL_FIELDS, Tools, read_tools, tools_json
from tidegate.engine.request import Constraint, Priority, SamplingParams
from tidegate.errors import RequestError

RouteWish = Literal["auto", "edge", "cloud"]
ContextPolicy = Literal["error", "truncate_oldest", "truncate_middle"]
Privacy = Literal["local", "redact", "sealed", "any"]

MODEL_CHARS = 256
MOST_CHOICES = 16
"""Answers of one call. Each has a place in the engine's line of its own."""
_DAY_MS = 86_400_000

MODEL = Name(
    name="model", most_chars=MODEL_CHARS, told="One of /v1/models; the first of them if absent."
)
_TOKENS: Final = {
    "type": "array",
    "items": TOKEN_ID,
    "minItems": 1,
}
_TEXT: Final = {"type": "string", "minLength": 1}
_PROMPT = Raw(
    name="prompt",
    required=True,
    schema_={
        "anyOf": [
            _TEXT,
            _TOKENS,
            {
                "type": "array",
                "items": {"anyOf": [_TEXT, _TOKENS]},
                "minItems": 1,
                "maxItems": 1,
            },
        ]
    },
    told="Text or token ids; or a list of one of either.",
)
_N = Integer(name="n", low=1, high=MOST_CHOICES, told="Answers to give; 1 if absent.")
_BEST_OF = Raw(
    name="best_of",
    schema_={"type": "integer", "minimum": 1, "maximum": MOST_CHOICES},
    told="Only the value of n.",
)
_STREAM = Flag(name="stream", told="Answer with server-sent events.")
_INCLUDE_USAGE = Flag(name="include_usage", told="A last chunk without choices has `usage`.")
_STREAM_OPTIONS = Inner(
    name="stream_options",
    told="Must come with stream.",
    table=Table(
        name="StreamOptions",
        told="What a stream has beside text.",
        fields=(
            _INCLUDE_USAGE,
            Neutral(name="include_obfuscation", values=(False,), told="Chunks are not filled up."),
        ),
    ),
)
_CONTINUE = Flag(
    name="continue_final_message",
    told="The last message is the assistant's, and the answer goes on where it ends.",
)
_PROMPT_ENDS = Flag(
    name="add_generation_prompt", told="As vLLM's clients send it: not continue_final_message."
)

_ROUTE = Choice(name="route", allowed=get_args(RouteWish), told="Where it runs; auto if absent.")
_PRIVACY = Choice(
    name="privacy", allowed=get_args(Privacy), told="local and redact stay on the device."
)
_PRIORITY = Choice(
    name="priority",
    allowed=tuple(one.name.lower() for one in Priority),
    told="Which waiting calls run first; normal if absent.",
)
_DEADLINE_MS = Integer(
    name="deadline_ms", low=1, high=_DAY_MS, told="An answer that is later is of no use."
)
_CACHE = Flag(name="cache", told="Kept answers and prefixes may be used, and this one kept.")
_SPECULATION = Flag(name="speculation", told="Tokens may be guessed ahead.")
_CONTEXT_POLICY = Choice(
    name="context_policy", allowed=get_args(ContextPolicy), told="For a prompt that is too long."
)
_OPTIONS = Inner(
    name="tidegate",
    told="Where the call may run and how soon it is needed.",
    table=Table(
        name="TidegateOptions",
        told="What is Tidegate's own in a call.",
        fields=(
            *(_ROUTE, _PRIVACY, _PRIORITY, _DEADLINE_MS, _CACHE, _SPECULATION),
            _CONTEXT_POLICY,
        ),
    ),
)
_SHARED: Final[tuple[Field, ...]] = (MODEL, _N, _BEST_OF, _STREAM, _STREAM_OPTIONS, _OPTIONS)

CHAT = Table(
    name="ChatCall",
    told="A chat.",
    fields=(
        MESSAGES,
        *_SHARED,
        *SAMPLING_FIELDS["chat"],
        *CONSTRAINT_FIELDS,
        *TOOL_FIELDS,
        _CONTINUE,
        _PROMPT_ENDS,
        *CHAT_OTHERS,
    ),
    elsewhere=ONLY_COMPLETIONS,
)
COMPLETION = Table(
    name="CompletionCall",
    told="A raw prompt.",
    fields=(
        _PROMPT,
        *_SHARED,
        *SAMPLING_FIELDS["completion"],
        *CONSTRAINT_FIELDS,
        *COMPLETION_OTHERS,
    ),
    elsewhere=ONLY_CHATS,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The `tidegate` object of a request: where it may run and how soon it is needed."""

    route: RouteWish = "auto"
    privacy: Privacy = "sealed"
    priority: Priority = Priority.NORMAL
    deadline_ms: int | None = None
    cache: bool = True
    """Kept answers and computed prefixes may be used, and those of this call kept."""
    speculation: bool = True
    """Tokens may be guessed ahead; the answer is the same either way."""
    context_policy: ContextPolicy | None = None
    """For a prompt that is too long; None is the server's choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One validated request. Exactly one of `messages` and `prompt` is set."""

    kind: Kind
    model: str | None
    messages: tuple[Message, ...] = field(default=(), repr=False)
    prompt: str | tuple[int, ...] | None = field(default=None, repr=False)
    sampling: SamplingParams
    """`max_tokens` is `REST_OF_CONTEXT` when the client did not say; see `max_tokens_given`."""
    max_tokens_given: bool
    continue_final_message: bool = False
    """Chat: the last message is the assistant's and the answer goes on where it ends (as vLLM)."""
    constraint: Constraint | None = None
    tools: Tools | None = None
    n: int = 1
    """Answers that the caller asked for. A backend gives one; see `tidegate.api.choices`."""
    stream: bool = False
    include_usage: bool = False
    options: Options = field(default_factory=Options)
    retry_key: str | None = field(default=None, repr=False)
    """`Idempotency-Key`: a call with the same one is the same call, asked again. Not in JSON."""


def read_chat(data: object) -> Call:
    """The body of `/v1/chat/completions`, as parsed JSON.

    Raises:
        RequestError: a field is wrong or asks for something that is not supported.
    """
    return _read(CHAT.open(data), "chat")


def read_completion(data: object) -> Call:
    """The body of `/v1/completions`, as parsed JSON.

    Raises:
        RequestError: a field is wrong or asks for something that is not supported.
    """
    return _read(COMPLETION.open(data), "completion")


def _read(fields: Fields, kind: Kind) -> Call:
    max_tokens = read_max_tokens(fields)
    stream = _STREAM.read(fields) or False
    messages = read_messages(MESSAGES.read(fields)) if kind == "chat" else ()
    return Call(
        kind=kind,
        model=MODEL.read(fields),
        messages=messages,
        prompt=_prompt(_PROMPT.read(fields)) if kind == "completion" else None,
        sampling=read_sampling(fields, kind, REST_OF_CONTEXT if max_tokens is None else max_tokens),
        max_tokens_given=max_tokens is not None,
        continue_final_message=kind == "chat" and _continues(fields, messages),
        constraint=read_constraint(fields),
        tools=_tools(fields) if kind == "chat" else None,
        n=_choices(fields),
        stream=stream,
        include_usage=_includes_usage(fields, stream),
        options=_options(_OPTIONS.read(fields)),
    )


def _includes_usage(fields: Fields, stream: bool) -> bool:
    options = _STREAM_OPTIONS.read(fields)
    if options is None:
        return False
    if not stream:
        raise RequestError("stream_options", "is there: must come with stream, true, or be absent")
    return _INCLUDE_USAGE.read(options) or False


def _tools(fields: Fields) -> Tools | None:
    tools = read_tools(fields)
    constraint = read_constraint(fields)
    if tools is not None and constraint is not None and tools.mode != "none":
        problem = f"{constraint.name} asks for another shape: must be absent, or tool_choice none"
        raise RequestError("tools", problem)
    return tools


def _continues(fields: Fields, messages: tuple[Message, ...]) -> bool:
    wanted, ends = _CONTINUE.read(fields) or False, _PROMPT_ENDS.read(fields)
    if ends is wanted:
        problem = f"{shown(ends)}: must be absent, or not continue_final_message, {shown(wanted)}"
        raise RequestError("add_generation_prompt", problem)
    if wanted and (len(messages) < 2 or messages[-1].role != "assistant"):
        problem = "true: must come with an assistant message last and another before it"
        raise RequestError("continue_final_message", problem)
    return wanted


def _choices(fields: Fields) -> int:
    n, best_of = _N.read(fields), _BEST_OF.read(fields)
    wanted = 1 if n is None else n
    if best_of is not None and whole(best_of) != wanted:
        problem = f"{shown(best_of)} is not supported: must be n, {wanted}, or absent"
        raise RequestError("best_of", problem)
    return wanted


def _options(fields: Fields | None) -> Options:
    if fields is None:
        return Options()
    priority = _PRIORITY.read(fields)
    return Options(
        route=cast(RouteWish, _ROUTE.read(fields) or "auto"),
        privacy=cast(Privacy, _PRIVACY.read(fields) or "sealed"),
        priority=Priority[priority.upper()] if priority else Priority.NORMAL,
        deadline_ms=_DEADLINE_MS.read(fields),
        cache=_CACHE.read(fields) is not False,
        speculation=_SPECULATION.read(fields) is not False,
        context_policy=cast(ContextPolicy | None, _CONTEXT_POLICY.read(fields)),
    )


def _prompt(value: object) -> str | tuple[int, ...]:
    """One prompt; a list of one prompt is OpenAI's way of sending a batch of one."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if not isinstance(value, str | list):
        raise RequestError("prompt", f"is {kind_of(value)}: must be a string or token ids")
    if not value:
        raise RequestError("prompt", "is empty: must hold text or token ids")
    if isinstance(value, str):
        return prose(value, "prompt")
    if isinstance(value[0], str | list):
        raise RequestError("prompt", f"holds {len(value)} prompts: must be one")
    return token_ids(value, "prompt")


def call_to_json(call: Call) -> dict[str, object]:
    """The request body that `read_chat` or `read_completion` reads back as an equal `call`."""
    sampling, options = call.sampling, call.options
    body: dict[str, object] = {
        "model": call.model,
        "max_tokens": sampling.max_tokens if call.max_tokens_given else None,
        **sampling_json(sampling, call.kind),
        "continue_final_message": call.continue_final_message or None,
        "structured_outputs": None if call.constraint is None else constraint_json(call.constraint),
        "n": None if call.n == 1 else call.n,
        "stream": call.stream or None,
        "stream_options": {"include_usage": True} if call.include_usage else None,
        "tidegate": {
            "route": options.route,
            "privacy": options.privacy,
            "priority": options.priority.name.lower(),
            **({} if options.deadline_ms is None else {"deadline_ms": options.deadline_ms}),
            **({} if options.cache else {"cache": False}),
            **({} if options.speculation else {"speculation": False}),
            **(
                {} if options.context_policy is None else {"context_policy": options.context_policy}
            ),
        },
    }
    if call.tools is not None:
        body |= tools_json(call.tools)
    if call.kind == "chat":
        body["messages"] = [message_json(one) for one in call.messages]
    else:
        body["prompt"] = list(call.prompt) if isinstance(call.prompt, tuple) else call.prompt
    return {name: value for name, value in body.items() if value is not None}
