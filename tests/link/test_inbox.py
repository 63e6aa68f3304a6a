"""What waits for a core's next turn: all of it in order, none of it for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from tidegate.link.inbox import MOST_EVENTS, Inbox
from tidegate.link.transport import Message


def run(main: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 10))


def test_everything_that_came_is_taken_at_once_and_in_order() -> None:
    async def main() -> None:
        inbox = Inbox()
        messages = [Message(str(number), b"") for number in range(5)]
        for message in messages:
            await inbox.put(message)
        assert inbox.take() == messages
        assert inbox.take() == []

    run(main)


def test_what_arrives_after_the_taking_ends_the_next_wait() -> None:
    async def main() -> None:
        inbox = Inbox()
        await inbox.put(Message("a", b""))
        inbox.take()
        waiting = asyncio.create_task(inbox.wait(60.0))
        await asyncio.sleep(0)
        assert not waiting.done()
        await inbox.put(Message("b", b""))
        await waiting
        inbox.take()
        inbox.ring()
        await inbox.wait(60.0)

    run(main)


def test_a_wait_ends_when_its_time_is_over_or_was_before() -> None:
    async def main() -> None:
        await Inbox().wait(0.01)
        await Inbox().wait(-1.0)

    run(main)


def test_a_full_inbox_holds_up_who_fills_it_until_it_is_taken() -> None:
    async def main() -> None:
        inbox = Inbox()
        for number in range(MOST_EVENTS):
            await inbox.put(Message(str(number), b""))
        one_more = asyncio.create_task(inbox.put(Message("last", b"")))
        await asyncio.sleep(0.01)
        assert not one_more.done()
        assert len(inbox.take()) == MOST_EVENTS
        await one_more
        assert inbox.take() == [Message("last", b"")]

    run(main)
