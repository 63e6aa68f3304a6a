"""From a call with tools to an engine's request, and from its text to calls: both ends of one form.

A call can only be parsed where the model that made it is known, so it is parsed beside the engine,
and travels on as events of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace

from tidegate.api.tools import ToolDelta, Tools
from tidegate.api.tools_format import ToolForm, form_of, tools_constraint, visible_ids
from tidegate.api.tools_stream import ToolParser
from tidegate.engine.events import Event, Finished, TextDelta
from tidegate.engine.request import Constraint
from tidegate.engine.text import TextModel


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """How one answer's calls are written."""

    form: ToolForm
    constraint: Constraint
    visible: frozenset[int]


async def tool_use(tools: Tools | None, text: TextModel) -> ToolUse | None:
    """How `text`'s model is to write its calls; None when there is nothing to call.

    Raises:
        RequestError: the model cannot, or a tool's schema cannot be kept.
    """
    if tools is None or not tools.offered:
        return None
    form = form_of(text)
    constraint = await asyncio.to_thread(tools_constraint, tools, form, text)
    return ToolUse(form=form, constraint=constraint, visible=visible_ids(form, text))


async def with_calls(
    events: AsyncIterator[Event], form: ToolForm, request_id: str
) -> AsyncGenerator[ToolDelta | Event, None]:
    """The events of an answer with its calls read out of its text."""
    parser = ToolParser(form, request_id)
    async for event in events:
        if isinstance(event, TextDelta):
            for piece in _spread(event, parser.push(event.text)):
                yield piece
        else:
            for rest in parser.end():
                yield TextDelta(text=rest) if isinstance(rest, str) else rest
            if isinstance(event, Finished) and event.reason == "stop" and parser.calls:
                event = replace(event, reason="tool_calls")
            yield event


def _spread(delta: TextDelta, pieces: list[str | ToolDelta]) -> list[ToolDelta | TextDelta]:
    """`delta` as what was read in it; its tokens, and their likelihoods, come first."""
    later = [*pieces]
    begins = bool(later) and isinstance(later[0], str)
    first = replace(delta, text=str(later.pop(0)) if begins else "")
    told = [first] if first.text or first.tokens else []
    return [*told, *(TextDelta(text=one) if isinstance(one, str) else one for one in later)]
