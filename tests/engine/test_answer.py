"""An answer's events: joined for slow readers, one per token for those who must repeat them."""

from __future__ import annotations

import asyncio

from tidegate.api.wire import EVENT_BYTES, write_event
from tidegate.engine.answer import MOST_HELD_TOKENS, Channel
from tidegate.engine.events import (
    Cancelled,
    Event,
    ScoredToken,
    TextDelta,
    TokenLogprob,
    Usage,
)

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


def test_tokens_without_text_come_in_events_that_the_link_can_carry() -> None:
    top = tuple(TokenLogprob(token=7, data=b"word", logprob=-1.0625) for _ in range(20))
    scored = ScoredToken(chosen=top[0], top=top, text_offset=0)
    channel = Channel(join_unread=False)
    for _ in range(2 * MOST_HELD_TOKENS + 3):
        channel.add("", (7,), (scored,))
    channel.add("a", (8,), (scored,))

    async def read() -> list[TextDelta]:
        events = [await channel.next() for _ in range(3)]
        return [event for event in events if isinstance(event, TextDelta)]

    deltas = asyncio.run(read())
    assert [len(delta.tokens) for delta in deltas] == [MOST_HELD_TOKENS, MOST_HELD_TOKENS, 4]
    assert [delta.text for delta in deltas] == ["", "", "a"]
    assert all(len(write_event(delta)) < EVENT_BYTES for delta in deltas)
