"""`Progress`: the events of a call's choices become OpenAI's objects, whole or chunk by chunk."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import assert_never

from tidegate.api import answers, sse
from tidegate.api.backend import Routed
from tidegate.api.choices import Event, merged
from tidegate.api.schema import Call
from tidegate.api.tools import ToolDelta, whole_calls
from tidegate.engine.events import Finished, TextDelta


class Progress:
    """What the choices of one call have said so far, as objects for the client."""

    def __init__(self, call: Call, routed: Routed) -> None:
        self._call = call
        first = answers.Heading(
            kind=call.kind,
            created_s=int(time.time()),
            request_id=routed.request_id,
            routed=routed,
        )
        self._headings = {0: first}
        self._texts: dict[int, list[TextDelta]] = {}
        self._calls: dict[int, list[ToolDelta]] = {}
        self._ends: dict[int, Finished] = {}

    def opening(self) -> list[bytes]:
        """The first chunk of the first choice."""
        return [sse.encode(answers.opening(self._headings[0]))]

    def see(self, index: int, event: Event) -> list[bytes]:
        """Take an event of a choice; the chunks that tell of it in a stream."""
        match event:
            case Routed():
                begins = index not in self._headings
                known = self._headings[0 if begins else index]
                self._headings[index] = replace(known, routed=event, index=index)
                return [sse.encode(answers.opening(self._headings[index]))] if begins else []
            case TextDelta():
                if not self._call.stream:
                    self._texts.setdefault(index, []).append(event)
                elif event.text or event.scored:
                    chunk = answers.delta(self._headings[index], event.text, event.scored)
                    return [sse.encode(chunk)]
                return []
            case ToolDelta():
                if self._call.stream:
                    return [sse.encode(answers.tool_delta(self._headings[index], event))]
                self._calls.setdefault(index, []).append(event)
                return []
            case Finished():
                self._ends[index] = event
                return [sse.encode(answers.closing(self._headings[index], event))]
            case _:
                assert_never(event)

    def closing(self) -> list[bytes]:
        """The last chunks of a stream, once every choice has ended."""
        usage = []
        if self._call.include_usage:
            usage.append(sse.encode(answers.usage_chunk(self._headings[0], self._end())))
        return [*usage, sse.DONE]

    def whole(self) -> answers.Json:
        """The answer in one piece, once every choice has ended."""
        said = [self._said(index, end) for index, end in sorted(self._ends.items())]
        return answers.whole(self._headings[0], said, self._end())

    def _said(self, index: int, end: Finished) -> answers.Said:
        texts = self._texts.get(index, [])
        scored = tuple(one for delta in texts for one in delta.scored)
        return answers.Said(
            index=index,
            text="".join(delta.text for delta in texts),
            scored=None if self._call.sampling.logprobs is None else scored,
            calls=whole_calls(self._calls.get(index, [])),
            finished=end,
        )

    def _end(self) -> Finished:
        return merged([end for _, end in sorted(self._ends.items())])
