"""One thread that owns a core and its SQLite file, so that an fsync never stalls the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class CoreThread:
    """Runs functions one after another; results come back in the order of the calls."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))

    async def call_now(
        self, function: Callable[Concatenate[float, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Like `call`, with the monotonic time at which it runs as the first argument."""
        return await self.call(lambda: function(time.monotonic(), *args, **kwargs))

    def close(self) -> None:
        """Wait for what is running; nothing can be called afterwards."""
        self._executor.shutdown(wait=True)


async def to_its_end(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` in a thread, and when cancelled meanwhile wait until it has ended.

    Whoever keeps others from what it works on, by a lock, may let go only then.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        if not work.cancelled():
            work.exception()
        raise
