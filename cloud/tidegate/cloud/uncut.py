"""Work that is brought to its end even if whoever waits for it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


async def uncut(work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns. Cancelled, it waits for its end all the same, and then is.

    For what takes moments and would leave half of something behind.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # looked at: whoever would have got it is gone
        raise
