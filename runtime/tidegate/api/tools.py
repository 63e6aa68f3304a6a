"""Tools in a request, OpenAI's shape: what a model may call, whether it has to, and calls so far.

Only functions are tools. Schemas and arguments stay JSON text, as they came.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal, cast, get_args

from tidegate.api.field_table import Choice, Field, Flag, Ignored, Inner, Name, Raw, Table
from tidegate.api.fields import Fields, kind_of, prose, shown
from tidegate.errors import RequestError

ToolMode = Literal["none", "auto", "required"]

_TOOLS: Final = 128
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ID_CHARS: Final = 256
NO_PARAMETERS: Final = '{"type": "object", "properties": {}, "additionalProperties": false}'
"""What a function without `parameters` takes."""

_FUNCTION_NAME = Raw(
    name="name",
    schema_={"type": "string", "pattern": f"^{_NAME.pattern}$"},
    required=True,
    told="Of the function.",
)
_DESCRIPTION = Raw(name="description", schema_={"type": "string"}, told="For the model to read.")
_PARAMETERS = Raw(
    name="parameters",
    schema_={"type": "object"},
    told="The JSON schema of its arguments, enforced. Without it the function takes none.",
)
_STRICT = Flag(name="strict", told="The schema is enforced either way.")
_FUNCTION = Inner(
    name="function",
    required=True,
    told="What may be called.",
    table=Table(
        name="Function",
        told="A function that the model may call.",
        fields=(_FUNCTION_NAME, _DESCRIPTION, _PARAMETERS, _STRICT),
    ),
)
_TOOL_TYPE = Raw(name="type", schema_={"enum": ["function"]}, required=True, told="The only kind.")
_TOOL = Table(name="Tool", told="A tool of a chat.", fields=(_TOOL_TYPE, _FUNCTION))
TOOL_LIST = Raw(
    name="tools",
    schema_={"type": "array", "items": _TOOL.reference, "maxItems": _TOOLS},
    holds=(_TOOL,),
    told="What the model may call. Names must differ.",
)
_NAMED_TYPE = Choice(name="type", allowed=("function",), told="The only kind.")
_NAMED_FUNCTION = Inner(
    name="function",
    required=True,
    told="Which one.",
    table=Table(name="FunctionName", told="A function by name.", fields=(_FUNCTION_NAME,)),
)
_NAMED = Table(
    name="NamedToolChoice",
    told="The one tool that has to be called.",
    fields=(_NAMED_TYPE, _NAMED_FUNCTION),
)
_TOOL_CHOICE = Raw(
    name="tool_choice",
    schema_={"anyOf": [{"enum": [*get_args(ToolMode)]}, _NAMED.reference]},
    holds=(_NAMED,),
    told="Whether to call: auto if absent.",
)
_PARALLEL = Flag(
    name="parallel_tool_calls", told="Several calls in one answer are allowed; true if absent."
)
TOOL_FIELDS: Final[tuple[Field, ...]] = (TOOL_LIST, _TOOL_CHOICE, _PARALLEL)

_ARGUMENTS = Raw(
    name="arguments", schema_={"type": "string"}, required=True, told="A JSON object, as text."
)
_CALLED = Inner(
    name="function",
    required=True,
    told="What was called.",
    table=Table(
        name="CalledFunction",
        told="A function that was called.",
        fields=(_FUNCTION_NAME, _ARGUMENTS),
    ),
)
_CALL_ID = Name(name="id", most_chars=_ID_CHARS, told="Which the tool's message repeats.")
_CALL_TYPE = Choice(name="type", allowed=("function",), told="The only kind.")
_CALL = Table(
    name="ToolCall",
    told="A call that an earlier answer made.",
    fields=(
        _CALL_ID,
        _CALL_TYPE,
        _CALLED,
        Ignored(name="index", kind="integer", told="As streams have it."),
    ),
)
TOOL_CALLS = Raw(
    name="tool_calls",
    schema_={"type": "array", "items": _CALL.reference, "maxItems": _TOOLS},
    holds=(_CALL,),
    told="Of an assistant's message.",
)
TOOL_CALL_ID = Name(
    name="tool_call_id", most_chars=_ID_CHARS, told="Of a tool's message: the call it answers."
)


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
    tools = read_tool_list(fields)
    mode, name = _tool_choice(fields)
    parallel = _PARALLEL.read(fields)
    if not tools:
        if mode == "required":
            raise RequestError("tool_choice", "wants a call: must come with tools")
        return None
    if name is not None and name not in [tool.name for tool in tools]:
        raise RequestError("tool_choice.function.name", f"{shown(name)}: must be one of the tools")
    return Tools(tools=tools, mode=mode, name=name, parallel=parallel is not False)


def read_tool_list(fields: Fields) -> tuple[Tool, ...]:
    """The tools themselves; empty without any.

    Raises:
        RequestError: one is wrong, or two have the same name.
    """
    listed = TOOL_LIST.read(fields)
    if listed is None:
        return ()
    if not isinstance(listed, list) or len(listed) > _TOOLS:
        problem = f"is {kind_of(listed)}: must be a list of at most {_TOOLS} tools"
        raise RequestError("tools", problem)
    tools = tuple(_tool(one, f"tools[{index}]") for index, one in enumerate(listed))
    names = [tool.name for tool in tools]
    for index, one in enumerate(names):
        if one in names[:index]:
            raise RequestError(f"tools[{index}].function.name", f"{one!r} is there already")
    return tools


def _tool_choice(fields: Fields) -> tuple[ToolMode, str | None]:
    value = _TOOL_CHOICE.read(fields)
    if isinstance(value, dict):
        _NAMED_TYPE.read(Fields(value, "tool_choice"))  # another kind has other fields
        function = _NAMED_FUNCTION.read(_NAMED.open(value, "tool_choice"))
        name = None if function is None else _function_name(function)
        if name is None:
            raise RequestError("tool_choice.function.name", "is absent")
        return "required", name
    return cast(ToolMode, fields.choice("tool_choice", get_args(ToolMode)) or "auto"), None


def _tool(value: object, path: str) -> Tool:
    kind = _TOOL_TYPE.read(Fields(value, path))  # another kind has other fields
    if kind != "function":
        problem = f"{shown(kind)}: must be 'function', the only kind yet"
        raise RequestError(f"{path}.type", problem)
    function = _FUNCTION.read(_TOOL.open(value, path))
    if function is None:
        raise RequestError(f"{path}.function", "is absent")
    description, parameters = _DESCRIPTION.read(function), _PARAMETERS.read(function)
    return Tool(
        name=_function_name(function),
        description=None if description is None else _description(function),
        parameters=NO_PARAMETERS if parameters is None else _parameters(function),
        strict=_STRICT.read(function) or False,
    )


def _function_name(fields: Fields) -> str:
    name = _FUNCTION_NAME.read(fields)
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
    value = TOOL_CALLS.read(fields)
    if value is None:
        return ()
    path = fields.path("tool_calls")
    if not isinstance(value, list) or len(value) > _TOOLS:
        raise RequestError(path, f"is {kind_of(value)}: must be a list of at most {_TOOLS} calls")
    return tuple(_tool_call(_CALL.open(one, f"{path}[{i}]")) for i, one in enumerate(value))


def _tool_call(fields: Fields) -> ToolCall:
    _CALL_TYPE.read(fields)
    function = _CALLED.read(fields)
    if function is None:
        raise RequestError(fields.path("function"), "is absent")
    path = function.path("arguments")
    arguments = prose(_ARGUMENTS.read(function), path)
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise RequestError(path, "must be the text of a JSON object")
    return ToolCall(
        id=_CALL_ID.read(fields) or "",
        name=_function_name(function),
        arguments=arguments,
    )


def read_tool_call_id(fields: Fields) -> str | None:
    """Which call a tool's message answers."""
    return TOOL_CALL_ID.read(fields)


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
