"""The queue between a device's core and one caller that reads an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tidegate.errors import UnavailableError
from tidegate.link.device_views import Standing
from tidegate.link.effects import Delivered, Ended
from tidegate.link.envelope import RequestId


class NothingHeardError(UnavailableError):
    """The core has not even said that the deadline has passed."""


class Reader:
    """The queue between the core's effects and one caller of `request`."""

    def __init__(self, heard: Callable[[], None] | None = None) -> None:
        """Read for a caller who is told by `heard` whenever payloads arrive."""
        self.queue: asyncio.Queue[Delivered | Ended] = asyncio.Queue()
        self._heard = heard
        self._next = 0

    def put(self, output: Delivered | Ended) -> None:
        """Queue what has just arrived."""
        self.queue.put_nowait(output)
        if self._heard is not None and isinstance(output, Delivered):
            self._heard()

    def start_with(self, known: Standing) -> None:
        """Begin with what the outbox has; what arrived meanwhile overlaps it."""
        stored = tuple(known.payloads)
        early = [self.queue.get_nowait() for _ in range(self.queue.qsize())]
        self.queue.put_nowait(Delivered(request_id=RequestId(b""), first=0, payloads=stored))
        for output in early:
            self.queue.put_nowait(output)

    def fresh(self, output: Delivered) -> tuple[bytes, ...]:
        """The payloads of `output` that have not been read yet."""
        payloads = output.payloads[self._next - output.first :]
        self._next += len(payloads)
        return payloads
