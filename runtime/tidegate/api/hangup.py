"""SIGHUP for everyone in a process who looks at files again.

The handler stays once it is there: a hangup that comes when nobody listens any more, as while a
service drains, is heard by nobody, and does not end the process as it would by default.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Call = Callable[[], object]
_calls: list[tuple[asyncio.AbstractEventLoop, Call]] = []


@contextmanager
def on_hangup(call: Call) -> Iterator[None]:
    """Have every SIGHUP call it in this loop while the block runs, beside whoever else asked.

    Where there are no signals, or their handlers cannot be set because the first to ask is outside
    the main thread, it is never called.
    """
    if not _listening():
        yield
        return
    ours = (asyncio.get_running_loop(), call)
    _calls.append(ours)
    try:
        yield
    finally:
        _calls.remove(ours)


def _listening() -> bool:
    try:
        if signal.getsignal(signal.SIGHUP) is not hear:
            signal.signal(signal.SIGHUP, hear)
    except (AttributeError, ValueError):
        return False
    return True


def hear(*_: object) -> None:
    """The handler: everyone who asked is called, each in its own loop."""
    for loop, call in tuple(_calls):
        if not loop.is_closed():
            loop.call_soon_threadsafe(call)
