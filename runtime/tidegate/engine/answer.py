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
from typing import Final

from tidegate.engine.events import Event, ScoredToken, Terminal, TextDelta

MOST_HELD_TOKENS: Final = 256
"""Without any text, as special ones are: more than a character ever takes, and with twenty
alternatives each still no more than one event of the link may hold (`tidegate.api.wire`)."""


class Channel:
    """The engine's end. Nothing may follow `end`."""

    def __init__(self, *, join_unread: bool = True) -> None:
        self._join_unread = join_unread
        self._unread: deque[TextDelta] = deque()
        self._tokens: list[int] = []
        self._scored: list[ScoredToken] = []
        self._chars = 0
        self._terminal: Terminal | None = None
        self._ready = asyncio.Event()
        self.abandoned = False
        """The reader is gone. Set from any thread, by the garbage collector for one."""

    @property
    def ended(self) -> bool:
        return self._terminal is not None

    def add(
        self,
        text: str,
        tokens: tuple[int, ...] = (),
        scored: tuple[ScoredToken, ...] = (),
        *,
        cut: bool = False,
    ) -> None:
        """Queue text; tokens without text wait for the text they become a part of.

        Args:
            text: may be empty.
            tokens: that have come since.
            scored: the same with their likelihoods, when they were asked for.
            cut: a stop string ends the answer after `text`: tokens beyond are not told.
        """
        assert not self.ended, "nothing follows a terminal event"
        self._tokens.extend(tokens)
        self._scored.extend(scored)
        self._chars += len(text)
        if cut:
            self._scored = [one for one in self._scored if one.text_offset < self._chars]
        if text or len(self._tokens) >= MOST_HELD_TOKENS:
            self._unread.append(self._delta(text))
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
            self._unread.append(self._delta(""))
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
        scored = tuple(one for delta in self._unread for one in delta.scored)
        self._unread.clear()
        return TextDelta(text=text, tokens=tokens, scored=scored)

    def _delta(self, text: str) -> TextDelta:
        """`text` with all that has waited for it."""
        delta = TextDelta(text=text, tokens=tuple(self._tokens), scored=tuple(self._scored))
        self._tokens, self._scored = [], []
        return delta


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
