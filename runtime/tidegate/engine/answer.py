"""`Answer`: one request's events on their way from the engine's loop to whoever reads them.

Text that nobody has read yet is joined to one delta, so a slow reader costs no more memory than
its own answer and never holds the loop back. Who needs the same events every time, as a gateway
that may run a request again, asks for one delta per token instead. The terminal event comes once
and last.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from tidegate.engine.events import Event, Terminal, TextDelta


class Channel:
    """The engine's end. Nothing may follow `end`."""

    def __init__(self, *, join_unread: bool = True) -> None:
        self._join_unread = join_unread
        self._unread: deque[TextDelta] = deque()
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
            self._unread.append(TextDelta(text=text, tokens=tuple(self._tokens)))
            self._tokens = []
            self._ready.set()

    def end(self, terminal: Terminal) -> None:
        """Queue the terminal event."""
        assert not self.ended, "a request ends once"
        self._terminal = terminal
        self._ready.set()

    async def next(self) -> Event:
        """The next event: all unread text as one delta, or the oldest of them."""
        await self._ready.wait()
        if self.ended and self._tokens:
            self._unread.append(TextDelta(text="", tokens=tuple(self._tokens)))
            self._tokens = []
        if self._unread:
            delta = self._take()
            if not self.ended and not self._unread:
                self._ready.clear()
            return delta
        assert self._terminal is not None, "ready means text or an end"
        return self._terminal

    def _take(self) -> TextDelta:
        if not self._join_unread or len(self._unread) == 1:
            return self._unread.popleft()
        text = "".join(delta.text for delta in self._unread)
        tokens = tuple(token for delta in self._unread for token in delta.tokens)
        self._unread.clear()
        return TextDelta(text=text, tokens=tokens)


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
