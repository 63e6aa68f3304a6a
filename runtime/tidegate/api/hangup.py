"""SIGHUP for everyone in a process who looks at files again: a loop takes one handler only."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

Call = Callable[[], object]
_calls: WeakKeyDictionary[asyncio.AbstractEventLoop, list[Call]] = WeakKeyDictionary()


@contextmanager
def on_hangup(call: Call) -> Iterator[None]:
    """Have every SIGHUP call it while the block runs, beside whoever else asked for that.

    Where this loop gets no signals, outside the main thread or POSIX, it is never called.
    """
    loop = asyncio.get_running_loop()
    calls = _calls.setdefault(loop, [])
    if not calls and not _listen(loop, calls):
        yield
        return
    calls.append(call)
    try:
        yield
    finally:
        calls.remove(call)
        if not calls:
            loop.remove_signal_handler(signal.SIGHUP)


def _listen(loop: asyncio.AbstractEventLoop, calls: list[Call]) -> bool:
    def everyone() -> None:
        for call in tuple(calls):
            call()

    try:
        loop.add_signal_handler(signal.SIGHUP, everyone)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return False
    return True
