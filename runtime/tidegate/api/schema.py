"""Requests of the OpenAI-compatible API, read from JSON and validated field by field.

A `Call` keeps what the engine needs in its own types; every wrong field is one `RequestError` that
names it, what it was and what is allowed. Fields that clients send and that change nothing here
(`user`, `metadata`, `store`, ...) are ignored, as OpenAI's own API does with unknown ones; those
that would change the answer and are not supported are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from tidegate.api.fields import Fields, kind_of, prose, shown
from tidegate.api.schema_sampling import (
    REST_OF_CONTEXT,
    TOKEN_IDS,
    Kind,
    read_max_tokens,
    read_sampling,
    sampling_json,
)
from tidegate.api.structured import constraint_json, read_constraint
from tidegate.api.tools import (
    ToolCall,
    Tools,
    read_tool_call_id,
    read_tool_calls,
    read_tools,
    tool_call_object,
    tools_json,
)
from tidegate.engine.request import Constraint, Priority, SamplingParams
from tidegate.errors import RequestError

RouteWish = Literal["auto", "edge", "cloud"]
ContextPolicy = Literal["error", "truncate_oldest", "truncate_middle"]
Privacy = Literal["local", "redact", "sealed", "any"]
Role = Literal["system", "user", "assistant", "tool"]

MODEL_CHARS = 256
MOST_CHOICES = 16
"""Answers of one call. Each has a place in the engine's line of its own."""
_DAY_MS = 86_400_000
_ROLES = (*get_args(Role), "developer")

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
"""Fields that would change the answer and that nothing here serves yet: the values that do not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One chat message; text only, and an assistant's calls and a tool's answers to them."""

    role: Role
    content: str = field(repr=False)
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


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
    return _read(Fields(data), "chat")


def read_completion(data: object) -> Call:
    """The body of `/v1/completions`, as parsed JSON.

    Raises:
        RequestError: a field is wrong or asks for something that is not supported.
    """
    return _read(Fields(data), "completion")


def _read(fields: Fields, kind: Kind) -> Call:
    _refuse_unsupported(fields, kind)
    max_tokens = read_max_tokens(fields)
    stream_options = fields.inner("stream_options")
    messages = _messages(fields.raw("messages")) if kind == "chat" else ()
    return Call(
        kind=kind,
        model=fields.name("model", most_chars=MODEL_CHARS),
        messages=messages,
        prompt=_prompt(fields.raw("prompt")) if kind == "completion" else None,
        sampling=read_sampling(fields, kind, REST_OF_CONTEXT if max_tokens is None else max_tokens),
        max_tokens_given=max_tokens is not None,
        continue_final_message=kind == "chat" and _continues(fields, messages),
        constraint=read_constraint(fields),
        tools=_tools(fields, kind),
        n=_choices(fields),
        stream=fields.flag("stream") or False,
        include_usage=bool(stream_options and stream_options.flag("include_usage")),
        options=_options(fields.inner("tidegate")),
    )


def _tools(fields: Fields, kind: Kind) -> Tools | None:
    tools = read_tools(fields)
    if tools is None:
        return None
    if kind == "completion":
        raise RequestError("tools", "only chats have them: must be absent")
    constraint = read_constraint(fields)
    if constraint is not None and tools.mode != "none":
        problem = f"{constraint.name} asks for another shape: must be absent, or tool_choice none"
        raise RequestError("tools", problem)
    return tools


def _continues(fields: Fields, messages: tuple[Message, ...]) -> bool:
    wanted = fields.flag("continue_final_message") or False
    if wanted and (len(messages) < 2 or messages[-1].role != "assistant"):
        problem = "true: must come with an assistant message last and another before it"
        raise RequestError("continue_final_message", problem)
    return wanted


def _choices(fields: Fields) -> int:
    n, best_of = fields.integer("n", 1, MOST_CHOICES), fields.raw("best_of")
    wanted = 1 if n is None else n
    if best_of is not None and (type(best_of) is not int or best_of != wanted):
        problem = f"{shown(best_of)} is not supported yet: must be n, {wanted}, or absent"
        raise RequestError("best_of", problem)
    return wanted


def _refuse_unsupported(fields: Fields, kind: Kind) -> None:
    refused = _NEUTRAL if kind == "chat" else {**_NEUTRAL, "top_logprobs": (0,)}
    for name, neutral in refused.items():
        value = fields.raw(name)
        # By type as well: 0 equals False, but `"logprobs": 0` asks for something.
        if value is None or any(type(value) is type(ok) and value == ok for ok in neutral):
            continue
        allowed = "".join(f"{ok!r} or " for ok in neutral[:1]) + "absent"
        # A string's content stays out: `suffix` is a part of the prompt.
        found = kind_of(value) if isinstance(value, str) else shown(value)
        raise RequestError(name, f"{found} is not supported yet: must be {allowed}")


def _options(fields: Fields | None) -> Options:
    if fields is None:
        return Options()
    fields.only(
        *("route", "privacy", "priority", "deadline_ms", "cache", "speculation", "context_policy")
    )
    priority = fields.choice("priority", [one.name.lower() for one in Priority])
    return Options(
        route=cast(RouteWish, fields.choice("route", get_args(RouteWish)) or "auto"),
        privacy=cast(Privacy, fields.choice("privacy", get_args(Privacy)) or "sealed"),
        priority=Priority[priority.upper()] if priority else Priority.NORMAL,
        deadline_ms=fields.integer("deadline_ms", 1, _DAY_MS),
        cache=fields.flag("cache") is not False,
        speculation=fields.flag("speculation") is not False,
        context_policy=cast(
            ContextPolicy | None, fields.choice("context_policy", get_args(ContextPolicy))
        ),
    )


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        found = "is absent" if value is None else f"is {kind_of(value)}"
        raise RequestError("messages", f"{found}: must be a list of at least one message")
    return tuple(_message(Fields(one, f"messages[{i}]")) for i, one in enumerate(value))


def _message(fields: Fields) -> Message:
    role = fields.choice("role", _ROLES)
    if role is None:
        raise RequestError(fields.path("role"), "is absent")
    for name in ("function_call", "audio"):
        if fields.raw(name):
            raise RequestError(fields.path(name), "is not supported yet: must be absent")
    calls = read_tool_calls(fields)
    if calls and role != "assistant":
        raise RequestError(fields.path("tool_calls"), f"{role!r} makes no calls: must be absent")
    content = fields.raw("content")
    return Message(
        role="system" if role == "developer" else cast(Role, role),
        content="" if calls and content is None else _content(content, fields.path("content")),
        tool_calls=calls,
        tool_call_id=read_tool_call_id(fields) if role == "tool" else None,
    )


def _message_json(message: Message) -> dict[str, object]:
    told: dict[str, object] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        told["tool_calls"] = [tool_call_object(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    return told


def _content(value: object, path: str) -> str:
    if not isinstance(value, list):
        return prose(value, path)
    return "\n".join(_part(Fields(part, f"{path}[{i}]")) for i, part in enumerate(value))


def _part(fields: Fields) -> str:
    kind = fields.raw("type")
    if kind != "text":
        raise RequestError(fields.path("type"), f"{shown(kind)}: must be 'text', the only kind yet")
    return prose(fields.raw("text"), fields.path("text"))


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
    for index, token in enumerate(value):
        if type(token) is not int or not 0 <= token <= TOKEN_IDS:
            raise RequestError(f"prompt[{index}]", f"must be a token id from 0 to {TOKEN_IDS}")
    return tuple(value)


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
        body["messages"] = [_message_json(one) for one in call.messages]
    else:
        body["prompt"] = list(call.prompt) if isinstance(call.prompt, tuple) else call.prompt
    return {name: value for name, value in body.items() if value is not None}
