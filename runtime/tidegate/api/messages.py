"""The messages of a chat, read from JSON: text only, and calls of tools with what came of them.

Fields that the messages of OpenAI's own answers have are taken back, so that an answer's message
can be sent again as it came.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, cast, get_args

from tidegate.api.field_table import Choice, Ignored, Neutral, Raw, Table
from tidegate.api.fields import Fields, kind_of, prose, shown
from tidegate.api.tools import (
    TOOL_CALL_ID,
    TOOL_CALLS,
    ToolCall,
    read_tool_call_id,
    read_tool_calls,
    tool_call_object,
)
from tidegate.errors import RequestError

Role = Literal["system", "user", "assistant", "tool"]

_TEXT: Final = {"type": "string"}
_ROLE = Choice(
    name="role",
    allowed=(*get_args(Role), "developer"),
    required=True,
    told="Who speaks; developer is another name of system.",
)
_PART_TYPE = Raw(name="type", schema_={"enum": ["text"]}, required=True, told="The only kind.")
_PART_TEXT = Raw(name="text", schema_=_TEXT, required=True, told="What was said.")
_PART = Table(
    name="TextPart", told="A part of a message; several are lines.", fields=(_PART_TYPE, _PART_TEXT)
)
_CONTENT = Raw(
    name="content",
    schema_={"anyOf": [_TEXT, {"type": "array", "items": _PART.reference}]},
    holds=(_PART,),
    told="What was said. Only an assistant's message with tool_calls may be without.",
)
_UNUSED: Final = "Not told to the model."
_MESSAGE = Table(
    name="Message",
    told="One message of a chat.",
    fields=(
        _ROLE,
        _CONTENT,
        TOOL_CALLS,
        TOOL_CALL_ID,
        Ignored(name="name", kind="string", told=_UNUSED),
        Ignored(name="refusal", kind="string", told=_UNUSED),
        Ignored(name="annotations", kind="array", told=_UNUSED),
        Ignored(name="reasoning", kind="string", told=_UNUSED),
        Ignored(name="reasoning_content", kind="string", told=_UNUSED),
        Neutral(name="function_call", told="Not served: say it with tool_calls."),
        Neutral(name="audio", told="Not served."),
    ),
    rule={
        "anyOf": [
            {
                "required": ["content"],
                "properties": {
                    "content": {"type": ["string", "array"]},
                    "tool_calls": {"enum": [None, []]},
                },
            },
            {
                "required": ["tool_calls"],
                "properties": {
                    "role": {"const": "assistant"},
                    "tool_calls": {"type": "array", "minItems": 1},
                },
            },
        ]
    },
)
MESSAGES = Raw(
    name="messages",
    schema_={"type": "array", "items": _MESSAGE.reference, "minItems": 1},
    holds=(_MESSAGE,),
    required=True,
    told="The chat so far, at least one message.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One chat message; text only, and an assistant's calls and a tool's answers to them."""

    role: Role
    content: str = field(repr=False)
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


def read_messages(value: object) -> tuple[Message, ...]:
    """The messages of a chat.

    Raises:
        RequestError: there is none, or one is wrong; names where.
    """
    if not isinstance(value, list) or not value:
        found = "is absent" if value is None else f"is {kind_of(value)}"
        raise RequestError("messages", f"{found}: must be a list of at least one message")
    return tuple(_message(_MESSAGE.open(one, f"messages[{i}]")) for i, one in enumerate(value))


def _message(fields: Fields) -> Message:
    role = _ROLE.read(fields)
    if role is None:
        raise RequestError(fields.path("role"), "is absent")
    calls = read_tool_calls(fields)
    if calls and role != "assistant":
        raise RequestError(fields.path("tool_calls"), f"{role!r} makes no calls: must be absent")
    call_id = read_tool_call_id(fields)
    content = _CONTENT.read(fields)
    return Message(
        role="system" if role == "developer" else cast(Role, role),
        content="" if calls and content is None else _content(content, fields.path("content")),
        tool_calls=calls,
        tool_call_id=call_id if role == "tool" else None,
    )


def _content(value: object, path: str) -> str:
    if not isinstance(value, list):
        return prose(value, path)
    return "\n".join(_part(part, f"{path}[{i}]") for i, part in enumerate(value))


def _part(value: object, path: str) -> str:
    kind = _PART_TYPE.read(Fields(value, path))  # another kind has other fields
    if kind != "text":
        raise RequestError(f"{path}.type", f"{shown(kind)}: must be 'text', the only kind yet")
    fields = _PART.open(value, path)
    return prose(_PART_TEXT.read(fields), fields.path("text"))


def message_json(message: Message) -> dict[str, object]:
    """The message that `read_messages` reads back as an equal one."""
    told: dict[str, object] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        told["tool_calls"] = [tool_call_object(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    return told
