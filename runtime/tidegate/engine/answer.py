"""`Answer`: one request's events on their way from the engine's loop to whoever reads them.

Text that nobody has read yet is joined to one delta, so a slow reader costs no more memory than
its own answer and never holds the loop back. The terminal event comes once and last.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from tidegate.engine.events import Event, Terminal, TextDelta


class Channel:
    """The engine's end. `end` may be called again; only the first terminal event counts."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._terminal: Terminal | None = None
        self._ready = asyncio.Event()
        self.abandoned = False
        """The reader is gone. Set from any thread, by the garbage collector for one."""

    @property
    def ended(self) -> bool:
        return self._terminal is not None

    def add(self, text: str, tokens: tuple[int, ...] = ()) -> None:
        """Queue text; tokens without text wait for the text they become a part of."""
        assert not self.ended, "nothing follows a terminal event"
        self._tokens.extend(tokens)
        if text:
            self._texts.append(text)
            self._ready.set()

    def end(self, terminal: Terminal) -> None:
        """Queue the terminal event."""
        assert not self.ended, "a request ends once"
        self._terminal = terminal
        self._ready.set()

    async def next(self) -> Event:
        """The next event; all unread text as one delta."""
        await self._ready.wait()
        if self._texts or self._tokens:
            delta = TextDelta(text="".join(self._texts), tokens=tuple(self._tokens))
            self._texts, self._tokens = [], []
            if not self.ended:
                self._ready.clear()
            return delta
        assert self._terminal is not None, "ready means text or an end"
        return self._terminal


class Answer(AsyncIterator[Event]):
    """The reader's end: deltas, then exactly one terminal event.

    Leaving it early aborts the request: `aclose()`, cancelling the task that reads, or just
    dropping it. Only one task may read.
    """

    def __init__(self, channel: Channel, abort: Callable[[], None]) -> None:
        self._channel = channel
        self._abort = abort
        self._done = False

    async def __anext__(self) -> Event:
        if self._done:
            raise StopAsyncIteration
        try:
            event = await self._channel.next()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        self._done = isinstance(event, Terminal)
        return event

    async def aclose(self) -> None:
        """Abort the request if it has not ended; its KV is freed within one step."""
        if not self._done:
            self._done = True
            self._abort()

    def __del__(self) -> None:
        if not self._done:
            self._channel.abandoned = True
