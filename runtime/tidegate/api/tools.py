"""Tools in a request, OpenAI's shape: what a model may call, whether it has to, and calls so far.

Only functions are tools. Schemas and arguments stay JSON text, as they came.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal, cast, get_args

from tidegate.api.fields import Fields, kind_of, prose, shown
from tidegate.errors import RequestError

ToolMode = Literal["none", "auto", "required"]

_TOOLS: Final = 128
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ID_CHARS: Final = 256
NO_PARAMETERS: Final = '{"type": "object", "properties": {}, "additionalProperties": false}'
"""What a function without `parameters` takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str | None = field(default=None, repr=False)
    parameters: str = field(default=NO_PARAMETERS, repr=False)
    """The JSON schema of its arguments, as JSON."""
    strict: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """All tools of a request."""

    tools: tuple[Tool, ...]
    mode: ToolMode = "auto"
    name: str | None = None
    """The one that has to be called; `mode` is then `required`."""
    parallel: bool = True
    """Several calls in one answer are allowed."""

    @property
    def offered(self) -> tuple[Tool, ...]:
        """Those that this answer may call."""
        if self.mode == "none":
            return ()
        return tuple(tool for tool in self.tools if self.name in (None, tool.name))


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A call that an earlier answer made."""

    id: str
    name: str
    arguments: str = field(repr=False)
    """A JSON object, as text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolDelta:
    """A piece of a call in an answer: first its id and name, then its arguments as they come."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = field(default="", repr=False)


def read_tools(fields: Fields) -> Tools | None:
    """The tools of a chat; None without any.

    Raises:
        RequestError: a field is wrong, or a tool has to be called that is not there.
    """
    listed = fields.raw("tools")
    mode, name = _tool_choice(fields)
    parallel = fields.flag("parallel_tool_calls")
    if listed is None or listed == []:
        if mode == "required":
            raise RequestError("tool_choice", "wants a call: must come with tools")
        return None
    if not isinstance(listed, list) or len(listed) > _TOOLS:
        problem = f"is {kind_of(listed)}: must be a list of at most {_TOOLS} tools"
        raise RequestError("tools", problem)
    tools = tuple(_tool(Fields(one, f"tools[{index}]")) for index, one in enumerate(listed))
    names = [tool.name for tool in tools]
    for index, one in enumerate(names):
        if one in names[:index]:
            raise RequestError(f"tools[{index}].function.name", f"{one!r} is there already")
    if name is not None and name not in names:
        raise RequestError("tool_choice.function.name", f"{shown(name)}: must be one of the tools")
    return Tools(tools=tools, mode=mode, name=name, parallel=parallel is not False)


def _tool_choice(fields: Fields) -> tuple[ToolMode, str | None]:
    value = fields.raw("tool_choice")
    if isinstance(value, dict):
        wanted = Fields(value, "tool_choice")
        wanted.choice("type", ["function"])
        function = wanted.inner("function")
        name = None if function is None else _function_name(function)
        if name is None:
            raise RequestError("tool_choice.function.name", "is absent")
        return "required", name
    return cast(ToolMode, fields.choice("tool_choice", get_args(ToolMode)) or "auto"), None


def _tool(fields: Fields) -> Tool:
    if fields.raw("type") != "function":
        found = shown(fields.raw("type"))
        raise RequestError(fields.path("type"), f"{found}: must be 'function', the only kind yet")
    function = fields.inner("function")
    if function is None:
        raise RequestError(fields.path("function"), "is absent")
    description, parameters = function.raw("description"), function.raw("parameters")
    return Tool(
        name=_function_name(function),
        description=None if description is None else _description(function),
        parameters=NO_PARAMETERS if parameters is None else _parameters(function),
        strict=function.flag("strict") or False,
    )


def _function_name(fields: Fields) -> str:
    name = fields.raw("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problem = f"{shown(name)}: must be 1 to 64 letters, digits, dots, dashes and underscores"
        raise RequestError(fields.path("name"), problem)
    return name


def _description(fields: Fields) -> str:
    return prose(fields.raw("description"), fields.path("description"))


def _parameters(fields: Fields) -> str:
    value, path = fields.raw("parameters"), fields.path("parameters")
    if not isinstance(value, dict):
        raise RequestError(path, f"is {kind_of(value)}: must be a JSON schema")
    try:
        return prose(json.dumps(value, ensure_ascii=False), path)
    except (RecursionError, ValueError):  # too deep, or a number of thousands of digits
        raise RequestError(path, "is nested too deeply or holds too long a number") from None


def read_tool_calls(fields: Fields) -> tuple[ToolCall, ...]:
    """The calls of one assistant message.

    Raises:
        RequestError: one is wrong, or its arguments are no JSON object.
    """
    value = fields.raw("tool_calls")
    if value is None:
        return ()
    path = fields.path("tool_calls")
    if not isinstance(value, list) or len(value) > _TOOLS:
        raise RequestError(path, f"is {kind_of(value)}: must be a list of at most {_TOOLS} calls")
    return tuple(_tool_call(Fields(one, f"{path}[{index}]")) for index, one in enumerate(value))


def _tool_call(fields: Fields) -> ToolCall:
    function = fields.inner("function")
    if function is None:
        raise RequestError(fields.path("function"), "is absent")
    path = function.path("arguments")
    arguments = prose(function.raw("arguments"), path)
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise RequestError(path, "must be the text of a JSON object")
    return ToolCall(
        id=fields.name("id", most_chars=_ID_CHARS) or "",
        name=_function_name(function),
        arguments=arguments,
    )


def read_tool_call_id(fields: Fields) -> str | None:
    """Which call a tool's message answers."""
    return fields.name("tool_call_id", most_chars=_ID_CHARS)


def whole_calls(pieces: Iterable[ToolDelta]) -> tuple[ToolCall, ...]:
    """The calls that an answer's pieces add up to."""
    calls: dict[int, list[ToolDelta]] = {}
    for piece in pieces:
        calls.setdefault(piece.index, []).append(piece)
    return tuple(
        ToolCall(
            id=parts[0].id or "",
            name=parts[0].name or "",
            arguments="".join(part.arguments for part in parts),
        )
        for _, parts in sorted(calls.items())
    )


def tools_json(tools: Tools) -> dict[str, object]:
    """The fields that `read_tools` reads back as equal tools."""
    named = {"type": "function", "function": {"name": tools.name}}
    return {
        "tools": [tool_object(tool) for tool in tools.tools],
        "tool_choice": tools.mode if tools.name is None else named,
        "parallel_tool_calls": tools.parallel,
    }


def tool_object(tool: Tool) -> dict[str, object]:
    """A tool as OpenAI's API and chat templates have it."""
    function: dict[str, object] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = json.loads(tool.parameters)
    return {"type": "function", "function": function | ({"strict": True} if tool.strict else {})}


def tool_call_object(call: ToolCall) -> dict[str, object]:
    """A call as OpenAI's API has it."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
