"""An answer's events: joined for slow readers, one per token for those who must repeat them."""

from __future__ import annotations

import asyncio

from tidegate.engine.answer import Channel
from tidegate.engine.events import Cancelled, Event, TextDelta, Usage

END = Cancelled(usage=Usage(prompt_tokens=1, completion_tokens=4))
TEXTS = (("a", (1,)), ("", (2,)), ("bc", (3,)), ("d", (4,)), ("", (5,)))


def read_all(*, join_unread: bool, keep_up: bool) -> list[Event]:
    async def main() -> list[Event]:
        channel, events = Channel(join_unread=join_unread), list[Event]()
        for text, tokens in TEXTS:
            channel.add(text, tokens)
            if keep_up and text:
                events.append(await channel.next())
        channel.end(END)
        while not events or not isinstance(events[-1], Cancelled):
            events.append(await channel.next())
        return events

    return asyncio.run(main())


def test_what_a_slow_reader_left_comes_as_one_delta() -> None:
    assert read_all(join_unread=True, keep_up=False) == [
        TextDelta(text="abcd", tokens=(1, 2, 3, 4, 5)),
        END,
    ]


def test_separate_deltas_are_the_same_however_slow_the_reader_is() -> None:
    fast = read_all(join_unread=False, keep_up=True)
    assert fast == read_all(join_unread=False, keep_up=False)
    assert fast == [
        TextDelta(text="a", tokens=(1,)),
        TextDelta(text="bc", tokens=(2, 3)),
        TextDelta(text="d", tokens=(4,)),
        TextDelta(text="", tokens=(5,)),
        END,
    ]
