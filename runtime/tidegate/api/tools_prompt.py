"""A chat as its template wants it, tools and calls included.

A template that knows `tools` gets them as OpenAI's API has them, and calls with their arguments as
objects, which is what model authors write templates for. Any other gets the same in words: a
preamble in the system message, calls as `HERMES` writes them, and what came of them as the user's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Final

from tidegate.api.schema import Message
from tidegate.api.tools import Tool, ToolCall, Tools, tool_object
from tidegate.api.tools_format import HERMES
from tidegate.engine.text import TextModel

_PREAMBLE: Final = """\
You may call functions. They are listed here, one JSON object a line:
{tools}
To call one, answer with its name and arguments as JSON between two marks, and with nothing else:
{example}
What it returned then comes in the next message, between <tool_response> and </tool_response>."""
_MUST: Final = "\nAnswer with a call now."


def encode_with_tools(
    messages: Sequence[Message],
    tools: Tools | None,
    text: TextModel,
    *,
    limited: bool = True,
    ready: bool = True,
) -> tuple[int, ...]:
    """The tokens of a chat.

    Args:
        messages: at least one.
        tools: None for none.
        text: of the model that is to answer.
        limited: refuse more tokens than the context.
        ready: for the assistant's next turn, whose beginning is then the end of the prompt.

    Raises:
        RequestError: see `TextModel.encode_chat`.
    """
    offered = () if tools is None else tools.offered
    if text.knows_tools:
        told = [*_told(messages)]
        if not offered:
            return text.encode_chat(told, limited=limited, add_generation_prompt=ready)
        return text.encode_chat(
            told,
            limited=limited,
            add_generation_prompt=ready,
            tools=[tool_object(tool) for tool in offered],
        )
    spelt = [*_spelt(messages)]
    if offered:
        must = _MUST if tools is not None and tools.mode == "required" else ""
        spelt = _introduced(spelt, _preamble(offered) + must, text)
    return text.encode_chat(spelt, limited=limited, add_generation_prompt=ready)


def _told(messages: Sequence[Message]) -> Iterator[dict[str, object]]:
    names: dict[str | None, str] = {}
    for message in messages:
        told: dict[str, object] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            told["tool_calls"] = [_call(call) for call in message.tool_calls]
            names |= {call.id: call.name for call in message.tool_calls}
        if message.role == "tool" and message.tool_call_id is not None:
            told["tool_call_id"] = message.tool_call_id
            if message.tool_call_id in names:
                told["name"] = names[message.tool_call_id]
        yield told


def _call(call: ToolCall) -> dict[str, object]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def _spelt(messages: Sequence[Message]) -> Iterator[dict[str, str]]:
    for message in messages:
        if message.role == "tool":
            said = f"<tool_response>\n{message.content}\n</tool_response>"
            yield {"role": "user", "content": said}
        else:
            calls = [_spelt_call(call.name, call.arguments) for call in message.tool_calls]
            parts = [message.content] if message.content or not calls else []
            yield {"role": message.role, "content": "\n".join(parts + calls)}


def _spelt_call(name: str, arguments: str) -> str:
    return f"{HERMES.begin}{HERMES.head}{name}{HERMES.middle}{arguments}{HERMES.tail}"


def _preamble(tools: Sequence[Tool]) -> str:
    lines = "\n".join(
        json.dumps(tool_object(tool)["function"], ensure_ascii=False) for tool in tools
    )
    example = _spelt_call("<name>", '{"<argument>": <value>}')
    return _PREAMBLE.format(tools=lines, example=example)


def _introduced(
    messages: list[dict[str, str]], preamble: str, text: TextModel
) -> list[dict[str, str]]:
    """With the preamble before what the system says, or before all where no system may speak."""
    first = messages[0]
    takes_system = first["role"] == "system" or "raise_exception" not in text.template_source
    if first["role"] != "system" and takes_system:
        return [{"role": "system", "content": preamble}, *messages]
    content = f"{preamble}\n\n{first['content']}"
    return [{**first, "content": content}, *messages[1:]]
